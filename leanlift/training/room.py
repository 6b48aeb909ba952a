"""Whether what a run needs is there: memory on the card, room on the disk, a place to write to."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

from datasets import Dataset

from leanlift.errors import UserError
from leanlift.export import check_space
from leanlift.format import name_of, size
from leanlift.plan import MemoryPlan
from leanlift.processes import processes
from leanlift.training.arguments import LiftSFTConfig, RunArguments


def check_room(
    args: RunArguments,
    sft: LiftSFTConfig,
    plan: MemoryPlan | None,
    data: Any,
    output: Path,
    card: float | None,
) -> None:
    """Refuse a run that the card or the disk cannot hold.

    Args:
        args, sft: of the run.
        plan: None where there is none: then nothing is known.
        data: what is trained on.
        output: where results go.
        card: bytes of the card; None: a run on the CPU.

    Raises:
        UserError: one of them cannot.
    """
    if plan is not None and card is not None and plan.needed > card and not _finds(sft):
        raise UserError(
            f"this run is planned to need {size(plan.needed)}, and the card has {size(card)}: "
            f"choose settings with --fit {card / 2**30:.3g}GB."
        )
    if args.stream_base:
        _check_host(plan)
    check_space(output, disk_nbytes(args, sft, plan, steps_of(data, sft)))


def _check_host(plan: MemoryPlan | None) -> None:
    """Refuse a streamed base where several processes would each have one, or the host has no room
    for it."""
    if processes() > 1:
        raise UserError(
            f"stream_base keeps a base in the host's memory for one process, and {processes()} "
            "train together: leave it out, or start one process."
        )
    free, needed = free_host_nbytes(), 0 if plan is None else plan.host
    if free is not None and needed > free:
        raise UserError(
            f"a streamed base takes {size(needed)} of the host's memory, of which {size(free)} are "
            "free: hold the base in fewer bits (load_in_4bit), or leave out stream_base."
        )


def free_host_nbytes() -> int | None:
    """What the host's memory has left; None: it does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _finds(sft: LiftSFTConfig) -> bool:
    """Whether the loop looks for a batch that fits by itself."""
    return bool(getattr(sft, "auto_find_batch_size", False))


def steps_of(data: Any, sft: LiftSFTConfig) -> int | None:
    """Optimizer steps of a run; None where nobody knows."""
    if sft.max_steps > 0:
        return int(sft.max_steps)
    if not isinstance(data, Dataset):
        return None
    batches = math.ceil(len(data) / sft.per_device_train_batch_size)
    each = max(1, math.ceil(batches / sft.gradient_accumulation_steps))
    return math.ceil(each * sft.num_train_epochs)


def disk_nbytes(
    args: RunArguments, sft: LiftSFTConfig, plan: MemoryPlan | None, steps: int | None
) -> int:
    """What a run writes at most: checkpoints while one replaces another, adapter, merge."""
    if plan is None:
        return 0
    adapter, checkpoint = plan.adapter, plan.adapter + plan.moments
    merged = 2 * plan.weights if args.merged_dir else 0
    return checkpoint * kept(sft, steps) + adapter + merged


def kept(sft: LiftSFTConfig, steps: int | None) -> int:
    """Checkpoints that are there at once."""
    strategy = name_of(sft.save_strategy)
    if strategy == "no":
        return 0
    if steps is None:
        made = math.inf
    elif strategy == "epoch":
        made = max(1.0, sft.num_train_epochs)
    else:
        every = sft.save_steps if sft.save_steps >= 1 else max(1, sft.save_steps * steps)
        made = math.ceil(steps / every)
    most = sft.save_total_limit
    return int(min(made, math.inf if most is None else most + 1, 1000))


def check_writable(output: Path) -> None:
    """Refuse an output directory that cannot be written, before anything is loaded."""
    place = existing(output)
    if not os.access(place, os.W_OK):
        raise UserError(f"output_dir {output} cannot be written: {place} is not yours to write to.")


def existing(output: Path) -> Path:
    """The nearest directory at or above `output` that is there already."""
    return next(path for path in (output, *output.absolute().parents) if path.is_dir())


def free_nbytes(output: Path) -> int:
    """Bytes that are free where `output` will be."""
    return shutil.disk_usage(existing(output)).free
