"""LiftTrainer: TRL's SFTTrainer over a leanlift model.

TRL tokenizes, packs and computes the chunked loss; HF Trainer runs the loop, logs, evaluates and
schedules. This file adds what only leanlift can know: when the mask is refreshed, which optimizer
can follow a refresh, and which steps are not applied. Checkpoints are `resumable`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from trl import SFTConfig

from leanlift.data.dataset import TokenRows
from leanlift.data.lengths import LengthReport
from leanlift.data.positions import check_positions
from leanlift.data.ready import Rows, RowsForTraining, drop_untrained_packs
from leanlift.data.tokenizer import load_tokenizer, tell_model
from leanlift.defaults import SPARSE_OPTIMIZERS
from leanlift.errors import UserError
from leanlift.layers.lm_head import FrozenHead
from leanlift.measure import resident_peak
from leanlift.model import (
    RefreshReport,
    claim,
    embedding_size,
    lift_state,
)
from leanlift.optim import (
    SparseAdamW,
    check_remappable,
    unwrap,
)
from leanlift.rows.examples import columns_of
from leanlift.training.arguments import LiftSFTConfig
from leanlift.training.batches import LargestBatch
from leanlift.training.callbacks import Guard, Refresh
from leanlift.training.checkpointing.lock import make_output
from leanlift.training.checks import check_numbers, check_settings
from leanlift.training.eval_loss import TokenMeans, trained_tokens
from leanlift.training.loss import TRAINED, MarkTrained, forwarded, training_loss
from leanlift.training.resumable import ResumableTrainer
from leanlift.training.step_guard import StepGuard, clip_to_norm_, total_norm

logger = logging.getLogger("leanlift")


LOGGED_MEANS = ("entropy", "mean_token_accuracy")
"""What is logged beside the loss as a mean over tokens."""


class LiftTrainer(ResumableTrainer):
    """`SFTTrainer(model, args, train_dataset, …)` for a model from `get_lift_model`.

    Takes the arguments of `trl.SFTTrainer` except `peft_config`. Datasets, streams and lists of
    dicts may have `messages` (or `conversations`), `prompt`/`completion`, `text` or
    `instruction`/`input`/`output`, or `input_ids`. Gradient checkpointing is non-reentrant unless
    `gradient_checkpointing_kwargs` says otherwise.

    With `LiftSFTConfig` as `args`, `optim` may be "sparse_adamw" or "sparse_adamw_8bit", and
    `optim_in_backward` and `max_nonfinite_steps` are there; with a plain `SFTConfig` pass
    `optimizers=(SparseAdamW(...), None)`.

    A checkpoint keeps the settings of the run, the arguments and the data; going on under others is
    refused, but for those that change no step. Checkpoints are not pushed to a hub.

    Args:
        run_settings: more settings to keep and compare, JSON-ready.

    Attributes:
        length_reports: what became of each dataset's rows.
        refreshes: a `RefreshReport` per mask refresh of this process.
        guard: which steps were not applied.
        largest: the largest batch so far.

    Raises:
        UserError: the model is not attached, a dataset cannot be used, the optimizer's state
            could not follow a refresh or cannot train bf16 values, or too many steps in a row
            had a NaN or infinite loss or gradient; in `train`, a checkpoint is damaged or of
            another run, another process writes into output_dir, or nothing can be written there.
    """

    _tag_names = ["leanlift", "sft"]  # noqa: RUF012
    _name = "leanlift"

    def __init__(
        self,
        model: torch.nn.Module,
        args: SFTConfig | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        processing_class: Any = None,
        run_settings: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._lift = lift_state(model)
        claim(model)
        if train_dataset is None:
            raise UserError("LiftTrainer needs a train_dataset, got none.")
        args = _sft(args)
        check_numbers(args)
        given = kwargs.get("optimizers", (None, None))[0] or kwargs.get("optimizer_cls_and_kwargs")
        check_settings(args, self._lift.config, by_name=given is None)
        if getattr(args, "activation_offloading", False) and args.device.type == "cpu":
            raise UserError(
                "activation_offloading moves activations from a GPU to the CPU, and this run is on "
                "the CPU: leave it out."
            )
        if args.n_gpu > 1:  # Trainer would replicate the model, and our layers share their scratch
            logger.warning("Training on one GPU, %s, of %d.", args.device, args.n_gpu)
            args._n_gpu = 1
        # One process has nothing to dispatch; and accelerate would cut all tensors of a batch to
        # its rows, the positions of trained tokens among them.
        args.accelerator_config.dispatch_batches = False
        self.length_reports: dict[str, LengthReport] = {}
        self.refreshes: list[RefreshReport] = []
        self.largest = LargestBatch()
        self.guard = StepGuard(
            getattr(args, "max_nonfinite_steps", LiftSFTConfig.max_nonfinite_steps)
        )
        self._in_backward = bool(getattr(args, "optim_in_backward", False))
        self.run_settings = dict(run_settings or {})
        if args.optim in SPARSE_OPTIMIZERS and kwargs.get("optimizers", (None, None))[0] is None:
            kwargs["optimizer_cls_and_kwargs"] = (
                SparseAdamW,
                {**_sparse_options(args), "ops": self._lift.workspace.implementation},
            )
        _make_checkpointing_safe(model, args)
        make_output(args.output_dir)
        if processing_class is None:
            processing_class = load_tokenizer(
                self._lift.base.name, revision=self._lift.base.revision
            )
        tokenizer = _tokenizer_of(processing_class)
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        function = kwargs.pop("formatting_func", None)
        self._rows = RowsForTraining(tokenizer, args, embedding_size(model), ends, function)
        tell_model(model, tokenizer, args)
        self._built = False
        with _rows_retired(args):
            super().__init__(
                model=model,
                args=args,
                train_dataset=self._unwrapped(self._rows.train(train_dataset), "train"),
                eval_dataset=self._unwrapped(self._rows.eval(eval_dataset), "eval"),
                processing_class=processing_class,
                **kwargs,
            )
        self._built = True
        for name in self.length_reports:
            self._check_positions(name)
        self._eval_means = TokenMeans()
        self._loss = training_loss(
            self.model, self.args, self.compute_loss_func, self.accelerator.autocast()
        )
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

    def _unwrapped(self, rows: Any, name: str) -> Any:
        """What TRL shall have of ready rows; their report is kept."""
        if isinstance(rows, dict):
            return {key: self._unwrapped(part, key) for key, part in rows.items()}
        if isinstance(rows, TokenRows):
            self.length_reports[name] = rows.report
            if self._built:
                self._check_positions(name)
            return rows.data
        return rows

    def _check_positions(self, name: str) -> None:
        longest, what = self.length_reports[name].kept, f"the longest row of the {name} dataset"
        check_positions(self.model, longest, what, "set max_length")

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
        if self._built:
            ready = self._rows(dataset, dataset_name, packing)
            dataset = self._unwrapped(ready, dataset_name)
        packing = packing and "seq_lengths" not in columns_of(dataset)  # packed already
        made = super()._prepare_dataset(
            dataset, processing_class, args, packing, None, dataset_name
        )
        return drop_untrained_packs(made, dataset_name) if packing else made

    # --- evaluation ------------------------------------------------------------------------

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """As TRL's, and keeps what the mean over tokens needs."""
        found = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if found[0] is not None:
            count, logged = trained_tokens(inputs), self._metrics["eval"]
            self._eval_means.add("loss", found[0], count)
            for name in LOGGED_MEANS:
                if logged[name]:
                    self._eval_means.add(name, torch.as_tensor(logged[name][-1]), count)
        return found

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As Trainer's, with means over trained tokens instead of means of the batches' means,
        which depend on the batch size: the best checkpoint is chosen by them."""
        self._eval_means = TokenMeans()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        means = self._eval_means.means(self.accelerator)
        key = f"{metric_key_prefix}_loss"
        if key in output.metrics and "loss" in means:
            output.metrics[key] = means["loss"]
        for name in LOGGED_MEANS:
            if name in means:
                self._metrics["eval"][name] = [means[name]]
        return output

    # --- steps -----------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer, and refuse one that the mask or the values do not go with."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if self._lift.config.refresh_interval:
            check_remappable(optimizer)
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
        """Our own loss, but where only TRL's way will do: a loss function of the user's, or the
        auxiliary loss of a router. Outputs, where they are asked for, take a second forward pass,
        as TRL's do."""
        if self._loss is None or "shift_labels" in inputs:
            if isinstance(model.get_output_embeddings(), FrozenHead):
                raise UserError(
                    "quantize_embeddings keeps no dense output head: leave out compute_loss_func, "
                    "and set router_aux_loss_coef=0 for a model with a router."
                )
            inputs = {key: value for key, value in inputs.items() if key != TRAINED}
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        else:
            with self.accelerator.autocast():
                result = self._loss(model, inputs, num_items_in_batch)
            self._log_parts("train" if model.training else "eval", inputs)
            if return_outputs:
                with torch.no_grad():
                    result = result, model(**forwarded(inputs))
        if model.training:
            self.largest.see(inputs, self.state.global_step)
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

    def _clip_grad_norm(self, model: Any) -> Any:
        """As Trainer's, with a norm that does not overflow."""
        self.accelerator.unscale_gradients()
        return clip_to_norm_(_gradients(model), self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """None where gradients are gone by now: it would be logged as 0. Trainer's own clips to
        infinity, which makes NaN of a gradient whose norm overflows."""
        if self._in_backward:
            return None
        if grad_norm is None:
            self.accelerator.unscale_gradients()
            grad_norm = total_norm(_gradients(model))
        return grad_norm

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

    def _end_training(self) -> None:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, Guard):
                callback.end_training()

    def _send_telemetry(self) -> None:
        """None."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None per checkpoint: a card describes a finished model."""


def _gradients(model: Any) -> list[torch.Tensor]:
    return [values.grad for values in model.parameters() if values.grad is not None]


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


@contextmanager
def _rows_retired(args: SFTConfig) -> Iterator[None]:
    """Hide from TRL's constructor what has been done by now: it would do it again, to tokenized
    rows and to an embedding that cannot grow."""
    done = {"chat_template_path": None, "eos_token": None, "assistant_only_loss": False}
    kept = {key: getattr(args, key) for key in done}
    for key, value in done.items():
        setattr(args, key, value)
    try:
        yield
    finally:
        for key, value in kept.items():
            setattr(args, key, value)


def _sft(args: Any) -> SFTConfig:
    """Arguments as TRL's own: of `TrainingArguments` those that it has, as TRL takes them."""
    if args is None:
        return LiftSFTConfig()
    if isinstance(args, SFTConfig):
        return args
    return SFTConfig(**{**args.to_dict(), "hub_token": args.hub_token})


def _tokenizer_of(processing_class: Any) -> Any:
    """The tokenizer of a processor, with the processor's chat template; or the tokenizer itself."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = processing_class.chat_template
    return tokenizer
