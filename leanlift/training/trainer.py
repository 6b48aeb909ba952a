"""LiftTrainer: TRL's SFTTrainer over a leanlift model.

TRL tokenizes, packs and computes the chunked loss; HF Trainer runs the loop, logs, evaluates,
schedules and resumes. This file adds what only leanlift can know: which files a checkpoint is
made of, when the mask is refreshed, which optimizer can follow a refresh, and which steps are not
applied.
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
)
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import SFTConfig, SFTTrainer

from leanlift.checkpoint import open_tensors, read_json, sync_tree, write_json, write_tensors
from leanlift.ends import FrozenHead
from leanlift.errors import UserError
from leanlift.memory import resident_peak
from leanlift.model import (
    RefreshReport,
    claim,
    lift_state,
    restore_adapter,
    save_adapter,
)
from leanlift.optim import (
    SavedState,
    SparseAdamW,
    check_followable,
    restore_state,
    saved_state,
    unwrap,
)
from leanlift.training.arguments import SPARSE_OPTIMIZERS, LiftSFTConfig
from leanlift.training.callbacks import (
    OPTIMIZER_FACTS,
    OPTIMIZER_TENSORS,
    TRAINER_STATE,
    Guard,
    Refresh,
    last_whole_checkpoint,
)
from leanlift.training.data import LengthReport, drop_untrained, to_examples
from leanlift.training.loss import TRAINED, MarkTrained, tiled_loss
from leanlift.training.steps import StepGuard

logger = logging.getLogger("leanlift")

STAGING = ".saving"


class LiftTrainer(SFTTrainer):
    """`SFTTrainer(model, args, train_dataset, …)` for a model from `get_lift_model`.

    Takes the arguments of `trl.SFTTrainer` except `peft_config`. Datasets may have `messages`,
    `prompt`/`completion`, `text` or `instruction`/`input`/`output` columns. Gradient
    checkpointing is non-reentrant unless `gradient_checkpointing_kwargs` says otherwise.

    With `LiftSFTConfig` as `args`, `optim` may be "sparse_adamw" or "sparse_adamw_8bit", and
    `optim_in_backward` and `max_nonfinite_steps` are there; with a plain `SFTConfig` pass
    `optimizers=(SparseAdamW(...), None)`.

    Attributes:
        length_reports: what `max_length` did to each dataset.
        refreshes: a `RefreshReport` per mask refresh of this process.
        guard: which steps were not applied.

    Raises:
        UserError: the model is not attached, a dataset cannot be used, the optimizer's state
            could not follow a refresh or cannot train bf16 values, or too many steps in a row
            had a NaN or infinite loss or gradient.
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
        claim(model)
        if train_dataset is None:
            raise UserError("LiftTrainer needs a train_dataset, got none.")
        args = args or SFTConfig(output_dir="leanlift-output")
        if getattr(args, "activation_offloading", False) and args.device.type == "cpu":
            raise UserError(
                "activation_offloading moves activations from a GPU to the CPU, and this run is on "
                "the CPU: leave it out."
            )
        if args.n_gpu > 1:  # Trainer would replicate the model, and our layers share their scratch
            logger.warning("Training on one GPU, %s, of %d.", args.device, args.n_gpu)
            args._n_gpu = 1
        self.length_reports: dict[str, LengthReport] = {}
        self.refreshes: list[RefreshReport] = []
        self.guard = StepGuard(
            getattr(args, "max_nonfinite_steps", LiftSFTConfig.max_nonfinite_steps)
        )
        self._in_backward = bool(getattr(args, "optim_in_backward", False))
        self._staging: Path | None = None
        if args.optim in SPARSE_OPTIMIZERS and kwargs.get("optimizers", (None, None))[0] is None:
            kwargs["optimizer_cls_and_kwargs"] = (
                SparseAdamW,
                {**_sparse_options(args), "ops": self._lift.scratch.implementation},
            )
        _make_checkpointing_safe(model, args)
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(
                self._lift.base.name, revision=self._lift.base.revision, trust_remote_code=False
            )
        chat = getattr(processing_class, "chat_template", None) is not None
        super().__init__(
            model=model,
            args=args,
            train_dataset=_examples(train_dataset, chat, "train"),
            eval_dataset=_all_examples(eval_dataset, chat),
            processing_class=processing_class,
            **kwargs,
        )
        self._loss = tiled_loss(self.model, self.args, self.compute_loss_func)
        if self._loss is not None:
            self.data_collator: Any = MarkTrained(self.data_collator)
        self._last_finite = torch.zeros((), device=self.args.device)
        self._smooths_log, self.args.logging_nan_inf_filter = (
            self.args.logging_nan_inf_filter,
            False,
        )
        self.add_callback(Guard(self))
        self.add_callback(Refresh(self, self._lift.config.refresh_interval))

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
        if self._lift.config.values_dtype != "float32" and not isinstance(
            unwrap(optimizer), SparseAdamW
        ):
            raise UserError(
                f"{type(unwrap(optimizer)).__name__} rounds small updates of "
                f"{self._lift.config.values_dtype} values away: use optim=sparse_adamw or "
                "sparse_adamw_8bit, or values_dtype=float32."
            )
        return optimizer

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Our own loss where it can be, so that no tile of logits is larger than it must be."""
        if self._loss is None or return_outputs or "shift_labels" in inputs:
            if isinstance(model.get_output_embeddings(), FrozenHead):
                raise UserError(
                    "quantize_ends keeps no whole logits: train and evaluate with loss_type=nll or "
                    "chunked_nll, no label smoothing and no compute_metrics."
                )
            inputs = {key: value for key, value in inputs.items() if key != TRAINED}
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        else:
            with self.accelerator.autocast():
                result = self._loss(model, inputs, num_items_in_batch)
            self._log_parts("train" if model.training else "eval", inputs)
        if model.training:
            loss = result[0] if isinstance(result, tuple) else result
            self.guard.see_loss(loss.detach())
        return result

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's. What is logged of a loss that is not finite is the last one that was:
        Trainer's own `logging_nan_inf_filter` makes the host wait for the device at each step."""
        loss = super().training_step(*args, **kwargs)
        if self._smooths_log:
            loss = self._last_finite = torch.where(loss.isfinite(), loss, self._last_finite)
        return loss

    def _log_parts(self, mode: str, inputs: Any) -> None:
        """What TRL logs beside the loss: entropy, accuracy, tokens."""
        assert self._loss is not None
        parts = self._loss.last
        assert parts is not None
        self._metrics[mode]["entropy"].append(parts.mean_entropy)
        self._metrics[mode]["mean_token_accuracy"].append(parts.accuracy)
        if mode == "train":
            mask = inputs.get("attention_mask")
            self._total_train_tokens += inputs["input_ids"].numel() if mask is None else mask.sum()
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """None where gradients are gone by now: it would be logged as 0."""
        return None if self._in_backward else super()._get_grad_norm(model, grad_norm=grad_norm)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's, with the memory in GiB: allocated now and at most so far on CUDA, resident
        at most so far on a CPU."""
        if self.args.device.type == "cuda":
            logs["memory_allocated_gib"] = round(torch.cuda.memory_allocated() / 2**30, 4)
            logs["memory_peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 4)
        else:
            logs["memory_resident_gib"] = round(resident_peak() / 2**30, 4)
        for metrics in self._metrics.values():  # read from the device here, not at each step
            for name, values in metrics.items():
                metrics[name] = [float(value) for value in values]
        super().log(logs, *args, **kwargs)

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
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, Guard):
                    callback.remove_hooks()

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
            sync_tree(staged)
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

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The optimizer's state as safetensors and JSON; one that is not plain, as Trainer does."""
        saved = saved_state(self.optimizer, self.model.named_parameters())
        if saved is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        write_tensors(Path(output_dir) / OPTIMIZER_TENSORS, saved.tensors)
        write_json(Path(output_dir) / OPTIMIZER_FACTS, saved.facts)
        torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (Path(checkpoint) / OPTIMIZER_TENSORS).is_file():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        with open_tensors(Path(checkpoint) / OPTIMIZER_TENSORS) as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        saved = SavedState(tensors, read_json(Path(checkpoint) / OPTIMIZER_FACTS))
        restore_state(self.optimizer, self.model.named_parameters(), saved)
        schedule = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore_adapter(model if model is not None else self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        restore_adapter(self.model, self.state.best_model_checkpoint)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None per checkpoint: a card describes a finished model."""


def _sparse_options(args: SFTConfig) -> dict[str, Any]:
    """The options of `SparseAdamW` that the training arguments describe."""
    return {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "moments": SPARSE_OPTIMIZERS[args.optim],
        "seed": args.seed,
    }


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
