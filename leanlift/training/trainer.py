"""LiftTrainer: TRL's SFTTrainer over a leanlift model.

TRL tokenizes, packs and computes the chunked loss; HF Trainer runs the loop, logs, evaluates,
schedules and resumes. This file adds what only leanlift can know: which files a checkpoint is
made of, when the mask is refreshed, which optimizer can follow a refresh, and when a loss means
that training must stop.
"""

from __future__ import annotations

import copy
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoTokenizer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import SFTConfig, SFTTrainer

from leanlift.adapter import open_adapter
from leanlift.checkpoint import read_json
from leanlift.errors import UserError
from leanlift.model import RefreshReport, lift_state, load_adapter, refresh_mask, save_adapter
from leanlift.optim import check_followable
from leanlift.training.data import LengthReport, drop_untrained, to_examples

logger = logging.getLogger("leanlift")

TRAINER_STATE = "trainer_state.json"
STAGING = ".saving"


class LiftTrainer(SFTTrainer):
    """`SFTTrainer(model, args, train_dataset, …)` for a model from `get_lift_model`.

    Takes the arguments of `trl.SFTTrainer` except `peft_config`. Datasets may have `messages`,
    `prompt`/`completion`, `text` or `instruction`/`input`/`output` columns. Gradient
    checkpointing is non-reentrant unless `gradient_checkpointing_kwargs` says otherwise.

    Attributes:
        length_reports: what `max_length` did to each dataset.
        refreshes: a `RefreshReport` per mask refresh of this process.

    Raises:
        UserError: the model is not attached, a dataset cannot be used, the optimizer's state
            could not follow a refresh, or the loss became NaN.
    """

    _tag_names = ["leanlift", "sft"]  # noqa: RUF012
    _name = "leanlift"

    def __init__(
        self,
        model: torch.nn.Module,
        args: SFTConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        self._lift = lift_state(model)
        if train_dataset is None:
            raise UserError("LiftTrainer needs a train_dataset, got none.")
        args = args or SFTConfig(output_dir="leanlift-output")
        self.length_reports: dict[str, LengthReport] = {}
        self.refreshes: list[RefreshReport] = []
        self._staging: Path | None = None
        _make_checkpointing_safe(model, args)
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(self._lift.base.name)
        chat = getattr(processing_class, "chat_template", None) is not None
        super().__init__(
            model=model,
            args=args,
            train_dataset=_examples(train_dataset, chat, "train"),
            eval_dataset=_all_examples(eval_dataset, chat),
            processing_class=processing_class,
            **kwargs,
        )
        self.add_callback(_Refresh(self, self._lift.config.refresh_interval))

    # --- data ------------------------------------------------------------------------------

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: SFTConfig,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        """TRL's preparation in two passes, so that nothing is cut or dropped silently."""
        prepare = super()._prepare_dataset
        if not isinstance(dataset, Dataset):
            return prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)
        uncut = copy.copy(args)
        uncut.max_length, uncut.shuffle_dataset = None, False
        whole = prepare(dataset, processing_class, uncut, False, formatting_func, dataset_name)
        keep_end = args.truncation_mode == "keep_end"
        kept, report = drop_untrained(whole, args.max_length, keep_end, packing, dataset_name)
        self.length_reports[dataset_name] = report
        (logger.warning if report.truncated or report.untrained else logger.info)("%s", report)
        return prepare(kept, processing_class, args, packing, None, dataset_name)

    # --- steps -----------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if self._lift.config.refresh_interval:
            check_followable(optimizer)
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            last = last_whole_checkpoint(self.args.output_dir)
            kept = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
            raise UserError(
                f"the loss became {loss.item()} at step {self.state.global_step + 1}: training "
                f"stopped before the update; {kept}. Lower learning_rate, or look for a damaged "
                "row."
            )
        return loss

    # --- checkpoints -----------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As `Trainer.train`; `True` resumes from the last checkpoint that is whole."""
        shutil.rmtree(Path(self.args.output_dir) / STAGING, ignore_errors=True)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise UserError(
                    f"{self.args.output_dir} holds no whole checkpoint to resume from: start "
                    "without resume_from_checkpoint."
                )
        if resume_from_checkpoint:
            logger.warning("Resuming from %s.", resume_from_checkpoint)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

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
            super()._save_checkpoint(model, trial)
            if self.state.best_model_checkpoint == str(staged):
                self.state.best_model_checkpoint = str(final)
                self.state.save_to_json(str(staged / TRAINER_STATE))
            shutil.rmtree(final, ignore_errors=True)
            staged.rename(final)
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None
        rotate_checkpoints(
            output_dir=str(run),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The adapter and the tokenizer: never the base."""
        directory = output_dir or self.args.output_dir
        save_adapter(self.model, directory)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter(model if model is not None else self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_adapter(self.model, self.state.best_model_checkpoint)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None per checkpoint: a card describes a finished model."""


class _Refresh(TrainerCallback):
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
        self.trainer.refreshes.append(report)
        self.trainer.log(
            {
                "refresh_churn": report.churn,
                "refresh_settled": report.settled,
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
            with open_adapter(path):
                return str(path)
        except UserError as error:
            logger.warning("Passing over %s: %s", path, error)
    return None


def _make_checkpointing_safe(model: Any, args: SFTConfig) -> None:
    """Non-reentrant by default; the reentrant kind needs an input that requires grad."""
    options = args.gradient_checkpointing_kwargs
    if not args.gradient_checkpointing or not options:
        return  # transformers' own default is non-reentrant
    options.setdefault("use_reentrant", False)
    if options["use_reentrant"]:
        model.enable_input_require_grads()


def _examples(dataset: Any, chat: bool, name: str) -> Any:
    return to_examples(dataset, chat, name) if isinstance(dataset, Dataset) else dataset


def _all_examples(dataset: Any, chat: bool) -> Any:
    if isinstance(dataset, dict):
        return {name: _examples(part, chat, name) for name, part in dataset.items()}
    return _examples(dataset, chat, "eval")
