"""A Trainer callback that measures the training phase, and torch's own memory history."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import set_checkpoint_early_stop
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from leanlift.io.tensors import replacing
from leanlift.measure import (
    LiveBytes,
    MemoryMeter,
    state_buffers,
    static_categories,
    tensor_bytes,
)
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
        if self.meter.cuda or self._steps >= FOLLOWED_STEPS or self._live is not None:
            return
        model = kwargs["model"]
        state = state_nbytes(kwargs["optimizer"], state_buffers(model))
        self._static = sum(static_categories(model).values()) + state
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
        self.close()  # what comes between two steps, a refresh or an evaluation, is not training

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
            self._peak = max(self._peak or 0, self._static + self._live.peak)
            self._live = None

    @property
    def peak(self) -> int | None:
        """Peak bytes of tensors seen in training."""
        return self._peak


@contextmanager
def timeline(wanted: bool, output: Path) -> Iterator[None]:
    """Record torch's memory history and write it beside the report, also after an error; open it
    at https://pytorch.org/memory_viz. Only on CUDA."""
    if not (wanted and torch.cuda.is_available()):
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=1_000_000)
    try:
        # a recomputation stops early by an exception, which does not survive the history's stacks
        with set_checkpoint_early_stop(False):
            yield
    finally:
        output.mkdir(parents=True, exist_ok=True)
        with replacing(output / "memory_snapshot.pickle") as temporary:
            torch.cuda.memory._dump_snapshot(str(temporary))
        torch.cuda.memory._record_memory_history(enabled=None)
