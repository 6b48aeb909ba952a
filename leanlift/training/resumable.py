"""The part of `LiftTrainer` that stops and goes on: what Trainer saves and loads, made whole.

HF Trainer writes checkpoints in place, pickles what it can, takes what it finds, and lets the
optimizer's saved options override what the user asks for. Here a checkpoint is written whole and
sealed, read only after it was checked, and used only under the settings that it was made with.
What the files are, and what is checked, is in `checkpointing` and `whole`.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTTrainer

from leanlift.errors import UserError, first_line
from leanlift.io.tensors import read_json, replacing, write_json, write_tensors
from leanlift.model import LiftState, restore_adapter, save_adapter
from leanlift.optim import SavedState, check_saved, restore_state, saved_state
from leanlift.training.checkpointing.directory import (
    STAGING,
    checkpoint_to_resume,
    clean,
    keeping_what_was_good,
    put_in_place,
    rotate,
)
from leanlift.training.checkpointing.lock import OutputLock
from leanlift.training.checkpointing.loop_state import (
    check_same_schedule,
    plain,
    random_state,
    restore_random_state,
    unpickle,
)
from leanlift.training.checkpointing.settings import (
    Settings,
    check_same_settings,
    data_facts,
    settings_of,
)
from leanlift.training.checkpointing.whole import (
    OPTIMIZER_FACTS,
    OPTIMIZER_TENSORS,
    PICKLED,
    RANDOM,
    SCALE,
    SCHEDULE,
    TRAINER_STATE,
    Checkpoint,
    read_optimizer,
    read_random_state,
)

logger = logging.getLogger("leanlift")


class ResumableTrainer(SFTTrainer):
    """An `SFTTrainer` over an attached model, whose runs can be gone on with.

    Attributes:
        run_settings: more settings to keep in checkpoints and compare, JSON-ready.
        after_the_end: whether a run is gone on with that had taken all its steps.
    """

    _lift: LiftState
    run_settings: dict[str, Any]
    after_the_end: bool = False
    _staging: Path | None = None
    _data_facts: dict[str, Any] | None = None
    _settings: Settings

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As `Trainer.train`; `True` resumes from the last checkpoint that is whole."""
        output = Path(self.args.output_dir)
        with OutputLock(output):
            clean(output)
            self._settings = self._settings_now()
            self.after_the_end = False
            checkpoint = None
            if resume_from_checkpoint:
                checkpoint = self._go_on_from(checkpoint_to_resume(output, resume_from_checkpoint))
            try:
                return super().train(resume_from_checkpoint=checkpoint, **kwargs)
            finally:
                self._end_training()

    def _end_training(self) -> None:
        """After `train`, also after an error."""

    def _settings_now(self) -> Settings:
        if self._data_facts is None:  # read once: data do not change under a trainer
            self._data_facts = data_facts(self.train_dataset)
        return settings_of(self.args, self._lift.config, self.run_settings, self._data_facts)

    def _go_on_from(self, found: Checkpoint) -> str:
        """Say what has changed since; refuse what may not have."""
        for change in check_same_settings(found.settings, self._settings, str(found.path)):
            logger.warning("%s", change)
        logger.warning("Resuming from %s.", found.path)
        self.after_the_end = found.last
        return str(found.path)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, which logs, evaluates and saves as often as the checkpoint's run did, not
        as this one is told to. A callback that the checkpoint does not know begins as it is."""
        result = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        for part in (*self.callback_handler.callbacks, self.control):
            if isinstance(part, ExportableState):
                self.state.stateful_callbacks.setdefault(type(part).__name__, part.state())
        return result

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write `checkpoint-N` under a temporary directory and rename it when it is whole."""
        run = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._staging = run / STAGING
        staged, final = self._staging / name, run / name
        shutil.rmtree(self._staging, ignore_errors=True)
        try:
            with keeping_what_was_good(f"the checkpoint of step {self.state.global_step}", run):
                super()._save_checkpoint(model, trial)
                best = self.state.best_global_step
                if best is not None and best == self.state.global_step:
                    self.state.best_model_checkpoint = str(final)
                elif best is not None and (run / f"{PREFIX_CHECKPOINT_DIR}-{best}").is_dir():
                    self.state.best_model_checkpoint = str(run / f"{PREFIX_CHECKPOINT_DIR}-{best}")
                self.state.save_to_json(str(staged / TRAINER_STATE))
                put_in_place(staged, self._settings)
        finally:
            self._staging = None
            shutil.rmtree(run / STAGING, ignore_errors=True)
        rotate(run, self.args.save_total_limit, final, self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The adapter and the tokenizer: never the base."""
        directory = output_dir or self.args.output_dir
        save_adapter(self.model, directory)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(directory)

    def save_state(self) -> None:
        """As Trainer's, whole or not at all."""
        with replacing(Path(self.args.output_dir) / TRAINER_STATE) as temporary:
            self.state.save_to_json(str(temporary))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The optimizer's state as safetensors and JSON, the schedule as JSON; what is not plain,
        as Trainer does."""
        directory = Path(output_dir)
        named = dict(self.model.named_parameters())
        saved = saved_state(self.optimizer, named.items())
        if saved is None:
            torch.save(self.optimizer.state_dict(), directory / PICKLED[OPTIMIZER_FACTS])
        else:
            check_saved(saved, {name: parameter.numel() for name, parameter in named.items()})
            write_tensors(directory / OPTIMIZER_TENSORS, saved.tensors)
            write_json(directory / OPTIMIZER_FACTS, saved.facts)
        schedule = plain(self.lr_scheduler.state_dict())
        if schedule is None:
            torch.save(self.lr_scheduler.state_dict(), directory / PICKLED[SCHEDULE])
        else:
            write_json(directory / SCHEDULE, schedule)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        directory = Path(checkpoint)
        if (directory / OPTIMIZER_FACTS).is_file():
            saved = read_optimizer(directory)
            if self.args.device.type == "cpu":  # torch would train in the file's own pages
                saved = SavedState({k: t.clone() for k, t in saved.tensors.items()}, saved.facts)
            restore_state(self.optimizer, self.model.named_parameters(), saved)
        else:
            state = unpickle(directory / PICKLED[OPTIMIZER_FACTS])
            _load_into(self.optimizer, state, directory / PICKLED[OPTIMIZER_FACTS])
        if (directory / SCHEDULE).is_file():
            state = read_json(directory / SCHEDULE)
            own = plain(self.lr_scheduler.state_dict()) or {}
            check_same_schedule(own, state, str(directory / SCHEDULE))
        else:
            state = unpickle(directory / PICKLED[SCHEDULE])
            own = self.lr_scheduler.state_dict()
            check_same_schedule(own, state, str(directory / PICKLED[SCHEDULE]))
        self.lr_scheduler.load_state_dict(state)

    def _save_rng_state(self, output_dir: str) -> None:
        write_json(Path(output_dir) / RANDOM, random_state(self.args.device))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_random_state(read_random_state(Path(checkpoint)), self.args.device)

    def _save_scaler(self, output_dir: str) -> None:
        if self.accelerator.scaler is not None:
            write_json(Path(output_dir) / SCALE, self.accelerator.scaler.state_dict())

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Of an older checkpoint, as Trainer does."""
        if checkpoint is None or self.accelerator.scaler is None:
            return
        if (Path(checkpoint) / SCALE).is_file():
            self.accelerator.scaler.load_state_dict(read_json(Path(checkpoint) / SCALE))
        elif (Path(checkpoint) / "scaler.pt").is_file():
            self.accelerator.scaler.load_state_dict(unpickle(Path(checkpoint) / "scaler.pt"))
        else:
            raise UserError(f"{checkpoint} lacks the loss scale of fp16: it is not whole.")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore_adapter(model if model is not None else self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """As Trainer's; where that is gone, what was trained last is saved before it is said."""
        best = self.state.best_model_checkpoint
        try:
            restore_adapter(self.model, best)
        except UserError as error:
            output = self.args.output_dir
            with keeping_what_was_good("the adapter", output):
                self._save(output)
            raise UserError(
                f"the best checkpoint, {best}, cannot be loaded ({first_line(error).rstrip('.')}): "
                f"the adapter of the last step is saved in {output} instead."
            ) from None

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing of a run that has taken all its steps: Trainer's takes at least one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)


def _load_into(optimizer: torch.optim.Optimizer, state: Any, file: Path) -> None:
    try:
        optimizer.load_state_dict(state)
    except Exception as error:  # torch has no one kind for a state that does not fit
        raise UserError(
            f"{file} does not fit this run's optimizer ({first_line(error).rstrip('.')}): resume "
            "with the optim that it was saved with."
        ) from None
