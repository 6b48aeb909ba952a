"""A run of an attached model, in whatever trainer of transformers' or TRL's it is mixed into.

What a trainer computes is its own. How a run of ours begins, which steps are applied, when the mask
is refreshed, what is kept in a checkpoint and what a run is gone on with are the same for all.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from leanlift.io.tensors import replacing
from leanlift.lift_model import LiftModel
from leanlift.measure import resident_peak
from leanlift.model import RefreshReport, claim, lift_state, lifted, release
from leanlift.model.stream_state import let_rest
from leanlift.processes import is_first, processes, wait_for_all
from leanlift.streaming.offload import Host, Offload
from leanlift.training.arguments import LiftSFTConfig
from leanlift.training.batches import LargestBatch
from leanlift.training.callbacks import FrozenInputs, Guard, Recomputation, Refresh
from leanlift.training.checkpointing.directory import checkpoint_to_resume, clean
from leanlift.training.checkpointing.lock import OutputLock, make_output
from leanlift.training.checkpointing.names import TRAINER_STATE
from leanlift.training.checkpointing.settings import (
    Settings,
    check_same_settings,
    data_facts,
    settings_of,
)
from leanlift.training.checkpointing.whole import Checkpoint
from leanlift.training.checks import check_numbers, check_settings
from leanlift.training.given import (
    check_optimizer,
    make_checkpointing_safe,
    several_processes,
    with_optimizer,
)
from leanlift.training.lift_callback import check_same_positions, check_trained
from leanlift.training.rates import scale_rates
from leanlift.training.run_overrides import RunOverrides
from leanlift.training.step_guard import StepGuard

logger = logging.getLogger("leanlift")


class LiftRun(RunOverrides):
    """Mixed into a trainer: `prepare` before its constructor, `begin` after it.

    Attributes:
        refreshes: a `RefreshReport` per mask refresh of this process.
        guard: which steps were not applied.
        largest: the largest batch so far.
    """

    def prepare(
        self,
        model: Any,
        args: Any,
        given: dict[str, Any],
        run_settings: Mapping[str, Any] | None,
    ) -> tuple[LiftModel, dict[str, Any]]:
        """Look at what a trainer is given.

        Args:
            model: attached.
            args: of the loop.
            given: the constructor's further arguments.
            run_settings: more settings to keep and compare.

        Returns:
            The model and the further arguments that the trainer shall have.

        Raises:
            UserError: the model is not attached, or settings that cannot be.
        """
        self._lift = lift_state(model)
        check_trained(model)
        claim(model)  # a few tokens go through it before training begins
        check_numbers(args)
        optimizer = given.get("optimizers", (None, None))[0]
        by_name = not (optimizer or given.get("optimizer_cls_and_kwargs"))
        check_settings(args, self._lift.config, by_name=by_name)
        several_processes(args)
        given = with_optimizer(args, given, self._lift.workspace.implementation)
        make_checkpointing_safe(lifted(model), args)
        make_output(args.output_dir)
        self.run_settings = dict(run_settings or {})
        self._data_facts: dict[str, Any] | None = None
        self.in_backward = bool(getattr(args, "optim_in_backward", False))
        self.largest = LargestBatch()
        self.guard = StepGuard(
            getattr(args, "max_nonfinite_steps", LiftSFTConfig.max_nonfinite_steps),
            at_once=self.in_backward,
        )
        return model if isinstance(model, LiftModel) else LiftModel(model), given

    def begin(self) -> None:
        """What comes after the trainer's constructor."""
        if self.accelerator.ddp_handler is not None:  # or several processes hold gradients twice
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        self._last_finite = torch.zeros((), device=self.args.device)
        self._smooths_log = self.args.logging_nan_inf_filter
        self.args.logging_nan_inf_filter = False
        self._guarding = Guard(self.guard, self.in_backward, self._at_last_micro_batch)
        self._refreshing = Refresh(partial(Trainer.log, self))
        self.refreshes: list[RefreshReport] = self._refreshing.reports
        self.add_callback(FrozenInputs())
        self.add_callback(Recomputation())
        self.add_callback(self._guarding)
        self.add_callback(self._refreshing)
        if getattr(self.args, "activation_offloading", False):  # in the place of TRL's
            where = Host(self.args.device)
            self.maybe_activation_offload_context = Offload(lifted(self.model), where)
        release(self.model)

    def read_metrics(self) -> None:
        """Before something is logged."""

    # --- going on --------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As `Trainer.train`; `True` resumes from the last checkpoint that is whole."""
        output = Path(self.args.output_dir)
        check_same_positions(self.model)
        with OutputLock(output) if is_first() else nullcontext():
            if is_first():
                clean(output)
            wait_for_all()
            self.settings = self._settings_now()
            self._refreshing.catch_up = False
            self._guarding.scaled = self.accelerator.scaler is not None
            checkpoint = None
            if resume_from_checkpoint:
                checkpoint = self._go_on_from(checkpoint_to_resume(output, resume_from_checkpoint))
            claim(self.model)
            try:
                return super().train(resume_from_checkpoint=checkpoint, **kwargs)
            finally:
                release(self.model)
                self._guarding.end_training()
                let_rest(self.model)

    def _settings_now(self) -> Settings:
        if self._data_facts is None:  # read once: data do not change under a trainer
            self._data_facts = data_facts(self.train_dataset)
        run = {**self.run_settings, "processes": processes()}
        return settings_of(self.args, self._lift.config, run, self._data_facts)

    def _go_on_from(self, found: Checkpoint) -> str:
        """Say what has changed since; refuse what may not have."""
        for change in check_same_settings(found.settings, self.settings, str(found.path)):
            logger.warning("%s", change)
        logger.warning("Resuming from %s.", found.path)
        self._refreshing.catch_up = found.last
        return str(found.path)

    def save_state(self) -> None:
        """As Trainer's, whole or not at all, by the first process."""
        if not is_first():
            return
        with replacing(Path(self.args.output_dir) / TRAINER_STATE) as temporary:
            self.state.save_to_json(str(temporary))

    # --- steps -----------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer, and refuse one that the mask or the values do not go with."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        check_optimizer(optimizer, self._lift)
        if getattr(self.args, "scale_learning_rates", False):
            scale_rates(optimizer, self.model)
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's. What is logged of a loss that is not finite is the last one that was:
        Trainer's own `logging_nan_inf_filter` makes the host wait for the device at each step."""
        with self._gradients_apart():
            loss = super().training_step(*args, **kwargs)
        if self._smooths_log:
            loss = self._last_finite = torch.where(loss.isfinite(), loss, self._last_finite)
        return loss

    def _at_last_micro_batch(self) -> bool:
        return bool(self.accelerator.sync_gradients)

    def _gradients_apart(self) -> AbstractContextManager[Any]:
        """Updates in the backward pass add the gradients of several processes up themselves."""
        if self.in_backward and processes() > 1:
            apart: AbstractContextManager[Any] = self.model_wrapped.no_sync()
            return apart
        return nullcontext()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's, with the memory in GiB: allocated now and at most so far on CUDA, resident
        at most so far on a CPU."""
        if self.args.device.type == "cuda":
            logs["memory_allocated_gib"] = round(torch.cuda.memory_allocated() / 2**30, 4)
            logs["memory_peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 4)
        else:
            logs["memory_resident_gib"] = round(resident_peak() / 2**30, 4)
        self.read_metrics()
        super().log(logs, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None per checkpoint: a card describes a finished model."""
