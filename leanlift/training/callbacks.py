"""Around a step of `LiftTrainer`: guard it, refresh the mask."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from leanlift.errors import UserError
from leanlift.layers import LiftLinear
from leanlift.model import RefreshReport, lift_layers, lift_state, refresh_mask
from leanlift.model.base import without_input_gradients
from leanlift.model.kept_blocks import keep_last_blocks
from leanlift.model.stream_state import check_updates_in_backward, let_rest, stream_moments
from leanlift.optim import LARGEST_GRADIENT, SparseAdamW, unwrap
from leanlift.training.checkpointing.directory import last_checkpoint
from leanlift.training.step_guard import GradientHooks, StepGuard

logger = logging.getLogger("leanlift")


class Guard(TrainerCallback):
    """Hooks the gradients while training runs, and drops those of a step that is not applied.

    Args:
        guard: decides which steps are applied.
        in_backward: whether matrices are updated in the backward pass.
        is_last: whether the present micro-batch is the last one of its step.

    Attributes:
        scaled: whether a loss scaler (fp16) looks for infinities itself, and expects some.
    """

    def __init__(
        self, guard: StepGuard, in_backward: bool, is_last: Callable[[], bool] = lambda: True
    ) -> None:
        self.guard = guard
        self.in_backward = in_backward
        self.is_last = is_last
        self.scaled = False
        self.hooks: GradientHooks | None = None
        self._applied = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._check_begun_again(args)
        check_updates_in_backward(kwargs["model"], self.in_backward)
        self.remove_hooks()
        self.guard.forget_step()
        if self.scaled:
            return
        optimizer = unwrap(kwargs["optimizer"]) if self.in_backward else None
        assert optimizer is None or isinstance(optimizer, SparseAdamW)
        if optimizer is not None:
            stream_moments(kwargs["model"], optimizer, args.gradient_accumulation_steps > 1)
        self.hooks = GradientHooks(kwargs["model"], self.guard, optimizer, self.is_last)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        layers = lift_layers(kwargs["model"])
        if self.hooks is None:
            self._see_unscaled(layers)
        else:
            self.hooks.check_same(kwargs["model"])
            self.hooks.update_what_waits()
        applied, advice = False, partial(last_checkpoint, args.output_dir)
        try:
            applied = self.guard.end_step(state.global_step + 1, advice)
        finally:
            if applied:
                self._applied += 1
            elif self.hooks is not None:
                self.hooks.drop_step()
            else:
                for layer in layers.values():
                    layer.values.grad = None
            let_rest(kwargs["model"])

    def end_training(self) -> None:
        """After `train`, also after an error."""
        self.remove_hooks()
        self._applied = 0

    def remove_hooks(self) -> None:
        """Take the hooks off the values, where there are any."""
        if self.hooks is not None:
            self.hooks.remove()
            self.hooks = None

    def _see_unscaled(self, layers: Mapping[str, LiftLinear]) -> None:
        """Under fp16: gradients that are finite and too large, which the loss scaler lets pass."""
        for name, layer in layers.items():
            if layer.values.grad is not None:
                size = torch.linalg.vector_norm(layer.values.grad, float("inf")).float()
                self.guard.see_largest(name, torch.where(size.isfinite(), size, LARGEST_GRADIENT))

    def _check_begun_again(self, args: TrainingArguments) -> None:
        """`auto_find_batch_size` begins anew after running out of memory: step 0, fresh moments,
        a fresh schedule, over offsets that are no longer fresh."""
        if self._applied and args.auto_find_batch_size:
            raise UserError(
                f"the device ran out of memory after {self._applied} steps, and "
                "auto_find_batch_size would begin again with the offsets that they have trained: "
                "set per_device_train_batch_size, or let --fit choose."
            )


class FrozenInputs(TrainerCallback):
    """Lets no gradient be formed of what embeddings give, but where the reentrant kind of
    checkpointing needs it."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not (args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False):
            without_input_gradients(kwargs["model"])


class Recomputation(TrainerCallback):
    """Lets the last blocks keep their activations where the others are recomputed, and weights that
    are made for that serve the backward pass too.

    Args:
        count, reuse_weights: blocks, and whether weights do; None: as the arguments of the loop
            have it.
    """

    def __init__(self, count: int | None = None, reuse_weights: bool | None = None) -> None:
        self.count, self.reuse_weights = count, reuse_weights

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        count = getattr(args, "kept_blocks", 0) if self.count is None else self.count
        count = count if args.gradient_checkpointing else 0
        keep_last_blocks(kwargs["model"], count, getattr(args, "activation_offloading", False))
        given = self.reuse_weights
        reuse = getattr(args, "reuse_weights", False) if given is None else given
        workspace = lift_state(kwargs["model"]).workspace
        workspace.reuses_weights = bool(reuse and args.gradient_checkpointing)


class LastEvaluation(TrainerCallback):
    """Evaluates after the last step, whatever else is asked for; where an epoch ends with it and
    is evaluated, that is enough."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps and args.eval_strategy != "epoch":
            control.should_evaluate = True


class Refresh(TrainerCallback):
    """Refreshes the mask as the model's configuration says, but not after the last step; where a
    run is made longer, that is made up for.

    Args:
        log: takes what a refresh has to say beside the loss; None: it is put into the history of
            the trainer.

    Attributes:
        reports: one per refresh of this process.
        catch_up: whether a run is gone on with that had taken all its steps.
        progress: whether a bar is shown over the layers.
    """

    def __init__(self, log: Callable[[dict[str, float]], Any] | None = None) -> None:
        self.log = log
        self.reports: list[RefreshReport] = []
        self.catch_up = False
        self.progress = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.catch_up:
            self.on_step_end(args, state, control, **kwargs)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step, model = state.global_step, kwargs["model"]
        config = lift_state(model).config
        interval = config.refresh_interval
        if not interval or step % interval or step >= state.max_steps:
            return
        if any("refresh_churn" in row and row["step"] == step for row in state.log_history[-8:]):
            return  # another callback of this kind has done it
        _check_offsets(model, step, args.output_dir)
        report = refresh_mask(model, kwargs["optimizer"], self.progress)
        if report.held_back and not any(past.held_back for past in self.reports):
            logger.warning(
                "The store of retired entries (trained once, let go, offset kept) is full "
                "(retired_limit=%s): the refresh at step %d could not take %d new entries, and "
                "later ones will not either. Raise retired_limit for more room, or refresh_margin "
                "for fewer changes.",
                config.retired_limit,
                step,
                report.held_back,
            )
        self.reports.append(report)
        # Beside the loss of this step, not in its place: Trainer takes any log for the one that
        # was due.
        due = control.should_log
        said = {
            "refresh_churn": report.churn,
            "refresh_retired": report.retired,
            "refresh_retired_bytes": report.retired_nbytes,
            "refresh_held_back": report.held_back,
            "refresh_seconds": report.seconds,
        }
        if self.log is None:
            state.log_history.append({**said, "epoch": state.epoch, "step": step})
        else:
            self.log(said)
        control.should_log = due


def _check_offsets(model: Any, step: int, output_dir: str) -> None:
    """Selection would blame the base for an infinite weight."""
    for name, layer in lift_layers(model).items():
        if not bool(torch.isfinite(layer.values.detach()).all()):
            raise UserError(
                f"training stopped at step {step}: offsets of {name} are NaN or infinite; "
                f"{last_checkpoint(output_dir)}. Lower learning_rate."
            )
