"""Around a step of `LiftTrainer`: guard it, refresh the mask."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from leanlift.errors import UserError
from leanlift.model import lift_layers, refresh_mask
from leanlift.optim import LARGEST_GRADIENT, SparseAdamW, unwrap
from leanlift.training.checkpointing.directory import last_checkpoint
from leanlift.training.step_guard import GradientHooks

if TYPE_CHECKING:
    from leanlift.training.trainer import LiftTrainer

logger = logging.getLogger("leanlift")


class Guard(TrainerCallback):
    """Hooks the gradients while training runs, and drops those of a step that is not applied."""

    def __init__(self, trainer: LiftTrainer) -> None:
        self.trainer = trainer
        self.hooks: GradientHooks | None = None
        self._applied = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        self._check_begun_again()
        self.remove_hooks()
        trainer.guard.forget_step()
        if trainer.accelerator.scaler is not None:
            return  # fp16: the loss scaler looks for infinities itself, and expects some
        optimizer = unwrap(trainer.optimizer) if trainer._in_backward else None
        assert optimizer is None or isinstance(optimizer, SparseAdamW)
        self.hooks = GradientHooks(trainer.model, trainer.guard, optimizer)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        applied = False
        if self.hooks is None:
            self._see_unscaled()
        try:
            applied = self.trainer.guard.end_step(state.global_step + 1, self._last_checkpoint)
        finally:
            if applied:
                self._applied += 1
            elif self.hooks is not None:
                self.hooks.drop_step()
            else:
                for layer in lift_layers(self.trainer.model).values():
                    layer.values.grad = None

    def end_training(self) -> None:
        """After `train`, also after an error."""
        self.remove_hooks()
        self._applied = 0

    def remove_hooks(self) -> None:
        """Take the hooks off the values, where there are any."""
        if self.hooks is not None:
            self.hooks.remove()
            self.hooks = None

    def _see_unscaled(self) -> None:
        """Under fp16: gradients that are finite and too large, which the loss scaler lets pass."""
        for name, layer in lift_layers(self.trainer.model).items():
            if layer.values.grad is not None:
                size = torch.linalg.vector_norm(layer.values.grad, float("inf")).float()
                self.trainer.guard.see_largest(
                    name, torch.where(size.isfinite(), size, LARGEST_GRADIENT)
                )

    def _check_begun_again(self) -> None:
        """`auto_find_batch_size` begins anew after running out of memory: step 0, fresh moments,
        a fresh schedule, over offsets that are no longer fresh."""
        if self._applied:
            raise UserError(
                f"the device ran out of memory after {self._applied} steps, and "
                "auto_find_batch_size would begin again with the offsets that they have trained: "
                "set per_device_train_batch_size, or let --fit choose."
            )

    def _last_checkpoint(self) -> str:
        return last_checkpoint(self.trainer.args.output_dir)


class LastEvaluation(TrainerCallback):
    """Evaluates after the last step, whatever else is asked for; where an epoch ends with it and
    is evaluated, that is enough."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps and args.eval_strategy != "epoch":
            control.should_evaluate = True


class Refresh(TrainerCallback):
    """Refreshes the mask every `interval` optimizer steps, but not after the last one; where a run
    is made longer, that is made up for.

    Attributes:
        progress: whether a bar is shown over the layers.
    """

    def __init__(self, trainer: LiftTrainer, interval: int) -> None:
        self.trainer = trainer
        self.interval = interval
        self.progress = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.after_the_end:
            self.on_step_end(args, state, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step
        if not self.interval or step % self.interval or step >= state.max_steps:
            return
        self._check_offsets(step)
        report = refresh_mask(self.trainer.model, self.trainer.optimizer, self.progress)
        if report.held_back and not any(past.held_back for past in self.trainer.refreshes):
            logger.warning(
                "The store of retired entries (trained once, let go, offset kept) is full "
                "(retired_limit=%s): the refresh at step %d could not take %d new entries, and "
                "later ones will not either. Raise retired_limit for more room, or refresh_margin "
                "for fewer changes.",
                self.trainer._lift.config.retired_limit,
                step,
                report.held_back,
            )
        self.trainer.refreshes.append(report)
        self._log(
            control,
            {
                "refresh_churn": report.churn,
                "refresh_retired": report.retired,
                "refresh_retired_bytes": report.retired_nbytes,
                "refresh_held_back": report.held_back,
                "refresh_seconds": report.seconds,
            },
        )

    def _check_offsets(self, step: int) -> None:
        """Selection would blame the base for an infinite weight."""
        for name, layer in lift_layers(self.trainer.model).items():
            if not bool(torch.isfinite(layer.values.detach()).all()):
                raise UserError(
                    f"training stopped at step {step}: offsets of {name} are NaN or infinite; "
                    f"{last_checkpoint(self.trainer.args.output_dir)}. Lower learning_rate."
                )

    def _log(self, control: TrainerControl, logs: dict[str, Any]) -> None:
        """Log beside the loss of this step, not in its place: Trainer takes any log for the one
        that was due, and TRL gives it what it has collected for the loss."""
        due = control.should_log
        Trainer.log(self.trainer, logs)
        control.should_log = due
