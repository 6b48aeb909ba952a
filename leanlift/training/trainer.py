"""LiftTrainer: TRL's SFTTrainer over a leanlift model.

TRL tokenizes, packs and computes the chunked loss; HF Trainer runs the loop, logs, evaluates and
schedules. This file adds what only leanlift can know: its rows, its loss, when the mask is
refreshed, which steps are not applied, what a run is gone on with. What it replaces of the two
trainers' own private methods, checkpoints among them, is in `overrides`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from leanlift.data.dataset import TokenRows
from leanlift.data.images import ImageRows
from leanlift.data.lengths import LengthReport
from leanlift.data.pictures import naming_collator
from leanlift.data.positions import check_positions
from leanlift.data.ready import Rows, RowsForTraining, has_images
from leanlift.data.tokenizer import tell_model, tokenizer_of
from leanlift.errors import UserError
from leanlift.layers.frozen_head import FrozenHead
from leanlift.model import embedding_size, lift_state, lifted
from leanlift.processes import processes
from leanlift.training.checks import check_language_model
from leanlift.training.eval_loss import EvaluatesByToken
from leanlift.training.given import (
    as_sft_config,
    processing_of,
    rows_done,
)
from leanlift.training.loss import TRAINED, MarkTrained, forwarded, rehearse, training_loss

logger = logging.getLogger("leanlift")


class LiftTrainer(EvaluatesByToken):
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
        lift_state(model)
        inner = lifted(model)
        check_language_model(inner)
        if train_dataset is None:
            raise UserError("LiftTrainer needs a train_dataset, got none.")
        args = as_sft_config(args)
        model, kwargs = self.prepare(model, args, kwargs, run_settings)
        self.length_reports: dict[str, LengthReport] = {}
        self._built = False
        processing_class = self._tokenize_with(processing_class, inner, args, kwargs, train_dataset)
        with rows_done(args, images=self._rows.images):
            super().__init__(
                model=model,
                args=args,
                train_dataset=self._unwrapped(self._rows.train(train_dataset), "train"),
                eval_dataset=self._unwrapped(self._rows.eval(eval_dataset), "eval"),
                processing_class=processing_class,
                **kwargs,
            )
        self.data_collator: Any = naming_collator(self.data_collator, self._rows.images)
        self._built = True
        for name in self.length_reports:
            self._check_positions(name)
        self._compute_own_loss()
        self.begin()

    def _tokenize_with(
        self, processing_class: Any, model: Any, args: SFTConfig, given: dict[str, Any], rows: Any
    ) -> Any:
        """Set up how rows become tokens; what TRL shall have for a processing class."""
        processing_class, processor, sees = processing_of(processing_class, model, has_images(rows))
        tokenizer = tokenizer_of(processing_class)
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        function = given.pop("formatting_func", None)
        size = embedding_size(model)
        self._rows = RowsForTraining(tokenizer, args, size, ends, function, processor, sees)
        tell_model(model, tokenizer, args)
        return processing_class

    def _compute_own_loss(self) -> None:
        model, autocast = lifted(self.model), self.accelerator.autocast
        self._loss = training_loss(model, self.args, self.compute_loss_func, autocast())
        if self._loss is not None:
            flat = isinstance(self.data_collator, DataCollatorForLanguageModeling)
            packed = self.data_collator if flat and self.data_collator.padding_free else None
            types = rehearse(model, self._loss, autocast(), self._rows.images, packed)
            self.count_next_tokens()
            self.data_collator = MarkTrained(self.data_collator, types)

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
        return rows.data if isinstance(rows, ImageRows) else rows

    def _check_positions(self, name: str) -> None:
        longest, what = self.length_reports[name].kept, f"the longest row of the {name} dataset"
        check_positions(lifted(self.model), longest, what, "set max_length")

    def ready_rows(self, rows: Any, name: str, packing: bool) -> Any:
        return self._unwrapped(self._rows(rows, name, packing), name) if self._built else rows

    # --- steps -----------------------------------------------------------------------------

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Our own loss, but under a loss function of the user's or the auxiliary loss of a router,
        which is TRL's. Outputs, where they are asked for, take a second forward pass, as there."""
        if self._loss is None or "shift_labels" in inputs:
            if isinstance(lifted(model).get_output_embeddings(), FrozenHead):
                raise UserError(
                    "quantize_embeddings keeps no dense output head: leave out compute_loss_func, "
                    "and set router_aux_loss_coef=0 for a model with a router."
                )
            inputs = {key: value for key, value in inputs.items() if key != TRAINED}
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        else:
            with self.accelerator.autocast():
                result = model(computes=partial(self._own_loss, inputs, num_items_in_batch))
                if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                    result = result * processes()  # their mean is taken of tokens of all
            self._log_parts("train" if model.training else "eval", inputs)
            if return_outputs:
                with torch.no_grad():
                    result = result, model(**forwarded(inputs))
        if model.training:
            self.largest.see(inputs, self.state.global_step)
            loss = result[0] if isinstance(result, tuple) else result
            self.guard.see_loss(loss.detach())
        return result

    def _own_loss(self, inputs: Any, items: Any, model: Any) -> torch.Tensor:
        """The loss of a batch; inside the model's forward pass, for whoever is around it."""
        assert self._loss is not None
        return self._loss(model, inputs, items)

    def _log_parts(self, mode: str, inputs: Any) -> None:
        """What TRL logs beside the loss: entropy, accuracy, tokens."""
        assert self._loss is not None
        parts = self._loss.last
        assert parts is not None
        logged = self.logged(mode)
        logged["entropy"].append(parts.mean_entropy)
        logged["mean_token_accuracy"].append(parts.accuracy)
        logged["num_tokens"] = [
            self.count_tokens(inputs) if mode == "train" else self.tokens_so_far
        ]
