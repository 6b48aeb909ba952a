"""What leanlift replaces of TRL's SFTTrainer and HF's Trainer that is not theirs to promise.

Private methods and fields of theirs are named in this file alone. They may change with any release:
`tests/training/test_overrides.py` compares each with what it was when this was written, and says
what to look at.

Trainer writes checkpoints in place, pickles what it can, takes what it finds, and lets the
optimizer's saved options override what the user asks for. Here a checkpoint is assembled apart,
sealed and put in place when it is whole; what is in it, and what is checked, is in `checkpointing`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTConfig, SFTTrainer

from leanlift.data.ready import drop_untrained_packs
from leanlift.errors import UserError, first_line
from leanlift.export.processors import keep_processor
from leanlift.model import lift_state, lifted, restore_adapter, save_adapter
from leanlift.model.base import checkpoint_of
from leanlift.processes import is_first, of_all, processes
from leanlift.rows.examples import columns_of
from leanlift.training.checkpointing.directory import assembled, keeping_what_was_good, rotate
from leanlift.training.checkpointing.names import TRAINER_STATE
from leanlift.training.checkpointing.parts import (
    load_optimizer,
    load_random_state,
    load_scale,
    load_schedule,
    save_optimizer,
    save_random_state,
    save_scale,
    save_schedule,
)
from leanlift.training.checkpointing.settings import Settings
from leanlift.training.step_guard import clip_to_norm_, total_norm


def use_one_gpu(args: Any) -> None:
    """Keep Trainer from replicating the model: our layers share what they compute in."""
    args._n_gpu = 1


class TrainerOverrides(SFTTrainer):
    """An `SFTTrainer` with the private methods that `LiftTrainer` needs otherwise.

    Attributes:
        settings: of the run, kept in its checkpoints.
        in_backward: whether gradients are gone when a step ends.
    """

    _tag_names = ["leanlift", "sft"]  # noqa: RUF012
    _name = "leanlift"

    settings: Settings
    in_backward: bool = False
    _assembling: Path | None = None

    # --- data ------------------------------------------------------------------------------

    def ready_rows(self, rows: Any, name: str, packing: bool) -> Any:
        """Tokenized rows of a dataset that is given after construction."""
        return rows

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: SFTConfig,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        """Packing and shuffling are TRL's; rows given to `evaluate` are tokenized first."""
        dataset = self.ready_rows(dataset, dataset_name, packing)
        packing = packing and "seq_lengths" not in columns_of(dataset)  # packed already
        made = super()._prepare_dataset(
            dataset, processing_class, args, packing, None, dataset_name
        )
        return drop_untrained_packs(made, dataset_name) if packing else made

    # --- what is logged --------------------------------------------------------------------

    def logged(self, mode: str) -> dict[str, list[Any]]:
        """What TRL averages into its next log of "train" or "eval", by name."""
        metrics: dict[str, list[Any]] = self._metrics[mode]
        return metrics

    def count_tokens(self, inputs: Any) -> Any:
        """Count the tokens of a batch of training; all so far."""
        mask = inputs.get("attention_mask")
        self._total_train_tokens += inputs["input_ids"].numel() if mask is None else mask.sum()
        return self._total_train_tokens

    @property
    def tokens_so_far(self) -> Any:
        """Tokens of all batches of training."""
        return self._total_train_tokens

    def read_metrics(self) -> None:
        """Read from the device what is to be logged: here, not at each step."""
        for metrics in self._metrics.values():
            for name, values in metrics.items():
                metrics[name] = [float(value) for value in values]
        if processes() > 1:
            logged = of_all({mode: dict(each) for mode, each in self._metrics.items()})
            for mode, metrics in self._metrics.items():
                for name in metrics:
                    metrics[name] = together(name, [each[mode].get(name, []) for each in logged])

    def _send_telemetry(self) -> None:
        """None."""

    # --- the loss --------------------------------------------------------------------------

    def count_next_tokens(self) -> None:
        """Have the loss divided by the trained tokens of the whole accumulated batch, whatever the
        model's own loss does: ours takes their number, and shifts labels."""
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True

    # --- gradients -------------------------------------------------------------------------

    def _clip_grad_norm(self, model: Any) -> Any:
        """As Trainer's, with a norm that does not overflow."""
        self.accelerator.unscale_gradients()
        return clip_to_norm_(_gradients(model), self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """None where gradients are gone by now: it would be logged as 0. Trainer's own clips to
        infinity, which makes NaN of a gradient whose norm overflows."""
        if self.in_backward:
            return None
        if grad_norm is None:
            self.accelerator.unscale_gradients()
            grad_norm = total_norm(_gradients(model))
        return grad_norm

    # --- the loop --------------------------------------------------------------------------

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, which logs, evaluates and saves as often as the checkpoint's run did, not
        as this one is told to. A callback that the checkpoint does not know begins as it is."""
        result = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        for part in (*self.callback_handler.callbacks, self.control):
            if isinstance(part, ExportableState):
                self.state.stateful_callbacks.setdefault(type(part).__name__, part.state())
        return result

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing of a run that has taken all its steps: Trainer's takes at least one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # --- saving ----------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._assembling or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As Trainer's, in a directory apart; the checkpoint gets its place when it is whole."""
        run = Path(super()._get_output_dir(trial))
        step = self.state.global_step
        final = run / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        try:
            with assembled(run, step, self.settings) as self._assembling:
                super()._save_checkpoint(model, trial)
                best = self.state.best_global_step
                of_best = run / f"{PREFIX_CHECKPOINT_DIR}-{best}"
                if best is not None and (of_best == final or of_best.is_dir()):
                    self.state.best_model_checkpoint = str(of_best)
                if is_first():
                    self.state.save_to_json(str(self._assembling / final.name / TRAINER_STATE))
        finally:
            self._assembling = None
        if is_first():
            rotate(run, self.args.save_total_limit, final, self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The adapter, and the tokenizer or processor, by the first process: never the base."""
        if not is_first():
            return
        directory = output_dir or self.args.output_dir
        save_adapter(self.model, directory)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(directory)
        keep_processor(checkpoint_of(lift_state(self.model).base), Path(directory))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_first():  # all have the same
            return
        save_optimizer(Path(output_dir), self.optimizer, lifted(self.model).named_parameters())
        save_schedule(Path(output_dir), self.lr_scheduler)

    def _save_rng_state(self, output_dir: str) -> None:
        save_random_state(Path(output_dir), self.args.device)

    def _save_scaler(self, output_dir: str) -> None:
        if is_first():
            save_scale(Path(output_dir), self.accelerator.scaler)

    # --- loading ---------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore_adapter(model if model is not None else self.model, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            named, device = lifted(self.model).named_parameters(), self.args.device
            load_optimizer(Path(checkpoint), self.optimizer, named, device)
            load_schedule(Path(checkpoint), self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_random_state(Path(checkpoint), self.args.device)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_scale(Path(checkpoint), self.accelerator.scaler)

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


def together(name: str, values: list[list[float]]) -> list[float]:
    """What several processes log of a batch each: of a count the sum, of a mean the mean."""
    if name == "num_tokens":
        return [sum(each[-1] for each in values if each)]
    return [value for each in values for value in each]


def _gradients(model: Any) -> list[torch.Tensor]:
    return [values.grad for values in model.parameters() if values.grad is not None]
