"""`LiftCallback`: what leanlift adds to the steps of any trainer, and of a loop of one's own.

A trainer steps an optimizer. What only leanlift knows is when the mask is chosen again, how the
optimizer's state follows, which steps are not applied, that bf16 values need another rounding, and
where the memory went. `LiftTrainer` has all of it by itself; in `transformers.Trainer`, TRL's
trainers and their like it is one callback. `Steps` is the same for a loop that is written out.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from leanlift.errors import UserError
from leanlift.measure import MemoryMeter, save_report
from leanlift.model import (
    RefreshReport,
    claim,
    lift_layers,
    lift_state,
    refresh_mask,
    release,
)
from leanlift.processes import check_same, is_first
from leanlift.training.callbacks import FrozenInputs, Guard, Recomputation, Refresh
from leanlift.training.given import check_optimizer, one_gpu
from leanlift.training.memory import MemoryCallback
from leanlift.training.step_guard import GradientHooks, StepGuard


class LiftCallback(TrainerCallback):
    """Mask refresh, step guard and memory report for any `transformers.Trainer`.

        DPOTrainer(model=get_lift_model(model, config), callbacks=[LiftCallback()], …)

    Give it to the trainer's constructor. A refresh is logged as LiftTrainer logs it, and
    `leanlift report` reads the `memory.json` that is left in the output directory.

    Args:
        max_nonfinite_steps: steps in a row with a NaN or infinite gradient that end the run; one
            is not applied, and said.
        memory: whether the memory is measured and reported.
        kept_blocks: where blocks are recomputed, how many are not, the last ones.
        reuse_weights: whether weights that are made for that serve the backward pass too.

    Attributes:
        guard: which steps were not applied.
        refreshes: a `RefreshReport` per mask refresh of this process.

    Raises:
        UserError: while a trainer is made or begins: its model is not attached or nothing of it
            is trained, its optimizer cannot follow a refresh, or cannot train bf16 values, or
            something else is to generate than the model.
    """

    def __init__(
        self,
        max_nonfinite_steps: int = 3,
        memory: bool = True,
        kept_blocks: int = 0,
        reuse_weights: bool = False,
    ) -> None:
        self.guard = StepGuard(max_nonfinite_steps)
        self.keeping = Recomputation(kept_blocks, reuse_weights)
        self.guarding = Guard(self.guard, in_backward=False)
        self.refreshing = Refresh()
        self.refreshes: list[RefreshReport] = self.refreshing.reports
        self._measures = memory
        self._memory: MemoryCallback | None = None
        self._phase: Any = None
        self._peak: Any = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        check_trained(model)
        one_gpu(args)
        if "_orig_mod" in vars(model).get("_modules", {}):
            raise UserError(
                "TRL's trainers and their like look into a model, and find nothing in one that "
                "torch.compile made: give the trainer the model itself, with torch_compile=True."
            )
        if getattr(args, "cast_lm_head_to_fp32", False) and _is_tied(model):
            raise UserError(
                "TRL does not cast the head of an adapter model that is tied to its embedding: "
                "leave out cast_lm_head_to_fp32."
            )
        if getattr(args, "use_vllm", False):
            raise UserError(
                "use_vllm would generate with the base alone: vLLM is sent weights as they are "
                "stored, without offsets; leave it out, and the model itself generates."
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        claim(model)
        check_optimizer(kwargs["optimizer"], lift_state(model))
        check_same_positions(model)
        if self._memory is not None:  # of a run that ended in an error
            self._memory.close()
        if self._measures:
            meter = MemoryMeter(args.device)
            self._memory, self._phase = MemoryCallback(meter), meter.phase("train")
            self._peak = self._phase.__enter__()
        self.guarding.scaled = bool(args.fp16)
        FrozenInputs().on_train_begin(args, state, control, **kwargs)
        self.keeping.on_train_begin(args, state, control, **kwargs)
        self.guarding.on_train_begin(args, state, control, **kwargs)
        self.refreshing.on_train_begin(args, state, control, **kwargs)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._memory is not None:
            self._memory.on_step_begin(args, state, control, **kwargs)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._memory is not None:
            self._memory.on_pre_optimizer_step(args, state, control, **kwargs)
        self.guarding.on_pre_optimizer_step(args, state, control, **kwargs)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._memory is not None:
            self._memory.on_step_end(args, state, control, **kwargs)
        self.refreshing.on_step_end(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        release(kwargs["model"])
        self.guarding.end_training()
        if self._memory is not None:
            self._memory.on_train_end(args, state, control, **kwargs)
            self._phase.__exit__(None, None, None)
            self._peak.tensors = self._peak.tensors or self._memory.peak
            if is_first():
                save_report(self._memory.meter.report, args.output_dir)
            self._memory = None


class Steps:
    """The same for a loop that is written out, with an accelerator or without.

        steps = Steps(model, optimizer)
        for batch in batches:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    steps.before()
                optimizer.step()
                optimizer.zero_grad()
                if accelerator.sync_gradients:
                    steps.after()

    Args:
        model: what `get_lift_model` returned, or what an accelerator has made of it.
        optimizer: that trains it.
        done: optimizer steps that were taken before, where a loop goes on.
        max_nonfinite_steps: as for `LiftCallback`.

    Attributes:
        done: optimizer steps so far.
        guard: which were not applied.
        refreshes: a `RefreshReport` per mask refresh of this object.

    Raises:
        UserError: nothing is attached, or the optimizer cannot train it.
    """

    def __init__(
        self, model: Any, optimizer: Any, done: int = 0, max_nonfinite_steps: int = 3
    ) -> None:
        check_trained(model)
        claim(model)
        check_optimizer(optimizer, lift_state(model))
        check_same_positions(model)
        self.model, self.optimizer, self.done = model, optimizer, done
        self.guard = StepGuard(max_nonfinite_steps)
        self.refreshes: list[RefreshReport] = []
        self._hooks = GradientHooks(model, self.guard)

    def before(self) -> bool:
        """Before the optimizer's step: drops gradients that are not finite.

        Returns:
            Whether there are some left to step with.

        Raises:
            UserError: too many steps in a row had none, or the model trains something else than
                when the loop began.
        """
        self._hooks.check_same(self.model)
        applied = self.guard.end_step(self.done + 1, lambda: "what was saved stays")
        if not applied:
            self._hooks.drop_step()
        return applied

    def after(self) -> None:
        """After the optimizer's step: refreshes the mask where it is due."""
        self.done += 1
        interval = lift_state(self.model).config.refresh_interval
        if interval and self.done % interval == 0:
            self.refreshes.append(refresh_mask(self.model, self.optimizer))

    def close(self) -> None:
        """Take the hooks off the gradients; the next loop says anew that it knows of the mask."""
        self._hooks.remove()
        release(self.model)


def check_trained(model: Any) -> None:
    """Refuse a model of which nothing is trained.

    Raises:
        UserError: nothing is attached, or its adapter is off or frozen.
    """
    if lift_state(model).workspace.is_off:
        raise UserError(
            "the adapter of this model is off, so nothing of it would be trained: call "
            "model.base_model.enable_adapter_layers() first."
        )
    if not any(layer.values.requires_grad for layer in lift_layers(model).values()):
        raise UserError(
            "nothing of this model is trained: load its adapter with is_trainable=True, or call "
            "model.set_adapter(name) of the one to train."
        )


def _is_tied(model: Any) -> bool:
    return bool(getattr(model.config, "tie_word_embeddings", False))


def check_same_positions(model: Any) -> None:
    """Refuse processes that train other positions, or begin with other offsets, than the first.

    Raises:
        UserError: one does.
    """
    layers = list(lift_layers(model).values())
    tensors = (
        part
        for layer in layers
        for store in layer.learned.stores
        for part in (store.index.columns, store.index.counts, store.values)
    )
    check_same(tensors, "The positions or offsets that are trained", layers[0].values.device)
