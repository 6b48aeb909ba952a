"""Around a step of `LiftTrainer`: guard it, refresh the mask; and which checkpoint is whole."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from leanlift.adapter import open_adapter
from leanlift.checkpoint import open_tensors, read_json
from leanlift.errors import UserError
from leanlift.model import refresh_mask
from leanlift.optim import SparseAdamW, unwrap
from leanlift.training.steps import GradientHooks

if TYPE_CHECKING:
    from leanlift.training.trainer import LiftTrainer

logger = logging.getLogger("leanlift")

TRAINER_STATE = "trainer_state.json"
OPTIMIZER_TENSORS = "optimizer.safetensors"
OPTIMIZER_FACTS = "optimizer.json"


class Guard(TrainerCallback):
    """Hooks the gradients while training runs, and drops those of a step that is not applied."""

    def __init__(self, trainer: LiftTrainer) -> None:
        self.trainer = trainer
        self.hooks: GradientHooks | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        if trainer.accelerator.scaler is not None:
            return  # fp16: the loss scaler looks for infinities itself, and expects some
        optimizer = unwrap(trainer.optimizer) if trainer._in_backward else None
        assert optimizer is None or isinstance(optimizer, SparseAdamW)
        self.hooks = GradientHooks(trainer.model, trainer.guard, optimizer)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        applied = False
        try:
            applied = self.trainer.guard.end_step(state.global_step + 1, self._last_checkpoint)
        finally:
            if not applied and self.hooks is not None:
                self.hooks.drop_step()

    def remove_hooks(self) -> None:
        if self.hooks is not None:
            self.hooks.remove()
            self.hooks = None

    def _last_checkpoint(self) -> str:
        last = last_whole_checkpoint(self.trainer.args.output_dir)
        return f"the last checkpoint is {last}" if last else "there is no checkpoint yet"


class Refresh(TrainerCallback):
    """Refreshes the mask every `interval` optimizer steps, but not after the last one."""

    def __init__(self, trainer: LiftTrainer, interval: int) -> None:
        self.trainer = trainer
        self.interval = interval

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step
        if not self.interval or step % self.interval or step >= state.max_steps:
            return
        report = refresh_mask(self.trainer.model, self.trainer.optimizer)
        if report.held_back and not any(past.held_back for past in self.trainer.refreshes):
            logger.warning(
                "The settled entries have reached their bound (settled_limit=%s): the refresh at "
                "step %d held %d newcomers back, and later ones will too. Raise settled_limit for "
                "more room, or refresh_margin for fewer changes.",
                self.trainer._lift.config.settled_limit,
                step,
                report.held_back,
            )
        self.trainer.refreshes.append(report)
        self.trainer.log(
            {
                "refresh_churn": report.churn,
                "refresh_settled": report.settled,
                "refresh_settled_bytes": report.settled_nbytes,
                "refresh_held_back": report.held_back,
                "refresh_seconds": report.seconds,
            }
        )


def last_whole_checkpoint(output_dir: str | Path) -> str | None:
    """The latest `checkpoint-N` whose trainer state and adapter can be read, or None."""
    found: dict[int, Path] = {}
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = path.name.rpartition("-")[2]
        if number.isdigit():
            found[int(number)] = path
    for _, path in sorted(found.items(), reverse=True):
        try:
            read_json(path / TRAINER_STATE)
            if (path / OPTIMIZER_TENSORS).exists():
                read_json(path / OPTIMIZER_FACTS)
                with open_tensors(path / OPTIMIZER_TENSORS):
                    pass
            with open_adapter(path):
                return str(path)
        except UserError as error:
            logger.warning("Passing over %s: %s", path, error)
    return None
