"""A run on its way, and everything about it that can be wrong before its base is loaded."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leanlift.config import LiftConfig
from leanlift.errors import UserError
from leanlift.export import ONTO
from leanlift.format import name_of
from leanlift.layers.fused_elementwise import check_kernels
from leanlift.methods import SFT
from leanlift.plan import MemoryPlan
from leanlift.plan.base import NOT_COUNTED
from leanlift.training.arguments import (
    LiftSFTConfig,
    RunArguments,
    planned_loop,
    trains_on_gpu,
)
from leanlift.training.base import check_base_place, quantization
from leanlift.training.batches import Batches, largest_allowed, worst_batches
from leanlift.training.checkpointing.settings import check_same_settings, run_settings, settings_of
from leanlift.training.checks import check_settings
from leanlift.training.inputs import ReadyRows, check_merged_dir, checkpoint_of_run, ready_rows
from leanlift.training.interrupt import Interrupt
from leanlift.training.kept import with_kept
from leanlift.training.methods import check_method, ready_for, reward_functions
from leanlift.training.out_of_memory import card_nbytes
from leanlift.training.plan import (
    check_growth,
    check_memory_settings,
    check_reached,
    check_streaming,
)
from leanlift.training.room import check_room, check_writable
from leanlift.training.screens import Screen
from leanlift.training.told import first_row_of
from leanlift.weights.quantized import dtype_of

logger = logging.getLogger("leanlift")


@dataclass
class Job:
    """A run on its way.

    Attributes:
        args, sft: what it was told.
        screen: where it shows itself.
        interrupt: who stops it.
        command: what goes on with it after it was stopped; None: not known.
        before_training: called with the attached model and its tokenizer.
        phase: how far it has come.
        plan: once it is made.
        worst: the largest batches that its rows allow.
        begun: when, on time's monotonic clock.
    """

    args: RunArguments
    sft: LiftSFTConfig
    screen: Screen
    interrupt: Interrupt
    command: str | None = None
    before_training: Callable[[Any, Any], None] | None = None
    phase: str = "load"
    plan: MemoryPlan | None = None
    worst: Batches = field(default_factory=Batches)
    begun: float = field(default_factory=time.monotonic)

    @property
    def output(self) -> Path:
        """The directory that the run writes to."""
        return Path(self.sft.output_dir or "leanlift-output")

    @property
    def cuda(self) -> bool:
        """Whether the run computes on a GPU."""
        return trains_on_gpu(self.sft)


def look_at_input(
    job: Job, plan: Callable[[Batches], MemoryPlan | None] | None
) -> tuple[ReadyRows, dict[str, Any], str | None]:
    """Everything about a run that can be wrong before its base is loaded.

    Returns:
        What to train and to evaluate on, what the run was told, and the checkpoint to go on from.

    Raises:
        UserError: as `run`.
    """
    args, sft, config = job.args, job.sft, job.args.lift_config()
    found = checkpoint_of_run(sft, job.output)
    _check_told(job, config)
    with job.screen.phase("Reading the rows"):
        # before a load that takes minutes
        ready = (ready_rows if args.method == SFT else ready_for)(args, sft)
    check_growth(args, sft, ready.embedding_rows, ready.processor is not None)
    check_memory_settings(args, sft, ready.processor is not None)
    if ready.processor is None:
        check_reached(args, sft)
    told = run_settings(args, ready.data)
    if found is not None:
        check_same_settings(found.settings, settings_of(sft, config, told), str(found.path))
    if ready.processor is not None and config.selector == "gradient":
        raise UserError(
            "selector=gradient goes through rows of text, and these have images: leave it out."
        )
    first = first_row_of(ready, ready.tokenizer)
    if first is not None:
        job.screen.first_row(first)
    job.worst = _worst(args, sft, ready)
    if plan is not None:
        with job.screen.phase("Planning the memory"):
            job.plan = plan(job.worst)
        if job.plan is not None and NOT_COUNTED in job.plan.notes:
            logger.warning("In this plan %s", NOT_COUNTED)
    check_room(args, sft, job.plan, ready.data, job.output, card_nbytes(job.cuda))
    return ready, told, None if found is None else str(found.path)


def _check_told(job: Job, config: LiftConfig) -> None:
    """What is wrong with settings and places alone.

    Raises:
        UserError: something is.
    """
    args, sft = job.args, job.sft
    check_settings(sft, config)
    check_method(args, sft)
    check_streaming(args, sft)
    if args.fused_elementwise:
        check_kernels(job.cuda)
    reward_functions(args)
    check_merged_dir(args, job.output)
    check_writable(job.output)
    evaluates = name_of(sft.eval_strategy) != "no"
    if evaluates and not args.eval_dataset_name:
        raise UserError("eval_strategy wants evaluations: name rows with eval_dataset_name.")
    if args.merge_onto not in ONTO:
        raise UserError(f"expected merge_onto to be one of {ONTO}, got {args.merge_onto!r}.")
    quantization(args, dtype_of(args.dtype or "float32"))
    check_base_place(args)


def _worst(args: RunArguments, sft: Any, ready: ReadyRows) -> Batches:
    """The largest batches that the rows allow; of a method whose trainer tokenizes them, rows as
    long as the longest of those looked at."""
    evaluates = ready.eval_rows is not None
    if args.method == SFT:
        worst = worst_batches(ready.rows, ready.eval_rows, sft)
        return with_kept(worst, ready.kept, evaluates)
    loop = planned_loop(args, sft, ready.longest)
    train, evaluation = (
        largest_allowed(size, loop, False)
        for size in (loop.per_device_train_batch_size, loop.per_device_eval_batch_size)
    )
    worst = Batches(train, evaluation if evaluates else None)
    return with_kept(worst, ready.kept, evaluates)
