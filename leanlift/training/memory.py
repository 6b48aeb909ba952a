"""A Trainer callback that measures the training phase."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from leanlift.measure import LiveBytes, MemoryMeter, static_categories, tensor_bytes
from leanlift.model import lift_layers
from leanlift.optim import state_nbytes

FOLLOWED_STEPS = 3
"""On a CPU the live tensors of so many steps are followed; the first one has no optimizer state
yet, the later ones have all that a step ever has."""


class MemoryCallback(TrainerCallback):
    """Splits the peak of training into categories and leaves them in the meter's report.

    On CUDA the peak is that of the whole phase. On a CPU it is that of the first steps, so a
    later, longer batch can exceed it; the report says so.
    """

    def __init__(self, meter: MemoryMeter) -> None:
        self.meter = meter
        self._live: LiveBytes | None = None
        self._static = 0
        self._steps = 0
        self._gradients = 0
        self._peak: int | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.meter.cuda or self._steps or self._live is not None:
            return
        model = kwargs["model"]
        self._static = sum(static_categories(model).values()) + state_nbytes(kwargs["optimizer"])
        self._live = LiveBytes()
        self._live.__enter__()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        grads = tensor_bytes(layer.values.grad for layer in lift_layers(kwargs["model"]).values())
        self._gradients = max(self._gradients, grads)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._steps += 1
        if self._steps == FOLLOWED_STEPS:
            self.close()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()
        if self.meter.cuda:
            self._peak = self.meter.allocated_peak()
        if self._peak is None:
            return
        self.meter.add_training(kwargs["model"], kwargs["optimizer"], self._gradients, self._peak)
        if not self.meter.cuda:
            self.meter.report.notes.append(
                "tensors: live tensor bytes; in training, those of the first "
                f"{min(self._steps, FOLLOWED_STEPS)} steps."
            )

    def close(self) -> None:
        """Stop following; safe to call twice, and after an error."""
        if self._live is not None:
            self._live.__exit__(None, None, None)
            self._peak = self._static + self._live.peak
            self._live = None

    @property
    def peak(self) -> int | None:
        """Peak bytes of tensors seen in training."""
        return self._peak
