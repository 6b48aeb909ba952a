"""All of a run but the run: what can be wrong with it is found without loading or training.

Settings, rows, tokenizer and output directory are looked at as `run` does it. On top of that comes
what a run would find out later, or at its end: whether the plan fits the card, whether the disk has
room for the checkpoints and the merge, and whether every trained matrix has a place to be merged
into.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from leanlift.errors import UserError
from leanlift.export import check_space
from leanlift.memory import MemoryPlan, peak_line
from leanlift.screen import count, size
from leanlift.source import check_matrix_homes
from leanlift.training.arguments import LiftSFTConfig, RunArguments
from leanlift.training.batches import Batches
from leanlift.training.data import TokenRows
from leanlift.training.inputs import ReadyRows
from leanlift.training.interrupt import Interrupt
from leanlift.training.plan import targets_of
from leanlift.training.run import Job, look_at_input
from leanlift.training.screens import Screen
from leanlift.training.screens.libraries import shown

INDENT = " " * 8


@dataclass(frozen=True)
class Checked:
    """What a dry run has found.

    Attributes:
        steps: of the run, all of them; None: it trains on a stream without max_steps.
        plan: None where the model cannot be planned for.
        matrices: that are trained.
        merges: whether each of them has a place in a checkpoint that is on this machine; None:
            there is none yet.
        disk: bytes that checkpoints, adapter and merge take at most.
        free: bytes that are free there.
    """

    steps: int | None
    plan: MemoryPlan | None
    matrices: int
    merges: bool | None
    disk: int
    free: int


def dry_run(
    args: RunArguments,
    sft: LiftSFTConfig,
    plan: Callable[[Batches], MemoryPlan | None],
    screen: Screen,
    card: float | None = None,
) -> list[str]:
    """Look at a run, and say that it is ready.

    Args:
        args, sft, plan: as `run` has them.
        screen: shows what goes on, and the first row.
        card: bytes of the card; None: a run on the CPU.

    Returns:
        Lines of at most 80 columns.

    Raises:
        UserError: anything that would end the run, or leave nothing of it.
    """
    job = Job(args, sft, screen, Interrupt(screen.stopping))
    with shown(screen):
        ready, _, _ = look_at_input(job, plan)
        with screen.phase("Looking for a place for every matrix"):
            targets = targets_of(args, sft)
            merges = _check_merge(args, targets)
    if job.plan is not None and card is not None and job.plan.needed > card:
        raise UserError(
            f"this run is planned to need {size(job.plan.needed)}, and the card has {size(card)}: "
            f"choose settings with --fit {card / 2**30:.3g}GB."
        )
    _check_writable(job.output)
    steps = steps_of(ready.data, sft)
    needed = disk_nbytes(args, sft, job.plan, steps)
    check_space(job.output, needed)
    place = _existing(job.output)
    checked = Checked(steps, job.plan, len(targets), merges, needed, shutil.disk_usage(place).free)
    return lines_of(args, sft, ready, checked, card)


def lines_of(
    args: RunArguments,
    sft: LiftSFTConfig,
    ready: ReadyRows,
    checked: Checked,
    card: float | None,
) -> list[str]:
    """What a dry run says, in at most 80 columns."""
    rows = sft.per_device_train_batch_size * sft.gradient_accumulation_steps
    steps = "steps until max_steps" if checked.steps is None else f"{count(checked.steps)} steps"
    lines = ["", f"Run     {steps} of {rows} rows"]
    report = ready.rows.report if isinstance(ready.rows, TokenRows) else None
    if report is not None:
        lines.append(f"Rows    {count(report.rows - report.untrained)} examples are trained")
    lines += [f"Memory  {line}" if not n else INDENT + line for n, line in _numbered(checked, card)]
    lines.append(f"Disk    {_disk(args, sft, checked)}")
    lines.append(f"Merge   {_merge(checked)}")
    lines.append(f"Output  {sft.output_dir} is free")
    return [line[:80] for line in lines]


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
    held = plan.categories
    adapter = held["index"] + held["values"] + held["retired entries"]
    checkpoint = adapter + held["optimizer state"]
    merged = 2 * plan.weights if args.merged_dir else 0
    return checkpoint * _kept(sft, steps) + adapter + merged


def _kept(sft: LiftSFTConfig, steps: int | None) -> int:
    """Checkpoints that are there at once."""
    strategy = str(getattr(sft.save_strategy, "value", sft.save_strategy))
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


def _check_merge(args: RunArguments, targets: dict[str, tuple[int, int]]) -> bool | None:
    """Whether what is trained can be merged; None: the checkpoint is not here.

    Raises:
        UserError: it cannot.
    """
    place = Path(args.model_name_or_path)
    if not place.is_dir():
        return None
    check_matrix_homes(targets, place)
    return True


def _check_writable(output: Path) -> None:
    place = _existing(output)
    if not os.access(place, os.W_OK):
        raise UserError(f"output_dir {output} cannot be written: {place} is not yours to write to.")


def _existing(output: Path) -> Path:
    return next(path for path in (output, *output.absolute().parents) if path.is_dir())


# --- words ------------------------------------------------------------------------------------


def _numbered(checked: Checked, card: float | None) -> list[tuple[int, str]]:
    plan = checked.plan
    if plan is None:
        return [(0, "cannot be planned for this model")]
    free = "" if card is None else f", {size(card - plan.needed)} of the card stay free"
    lines = [f"needs {size(plan.needed)}{free}", *peak_line(plan.to_dict(), 72)]
    return list(enumerate(lines))


def _disk(args: RunArguments, sft: LiftSFTConfig, checked: Checked) -> str:
    kept = _kept(sft, checked.steps)
    parts = [f"{kept} checkpoint{'s' * (kept != 1)}"] if kept else []
    parts += ["the adapter", *(["the merged model"] if args.merged_dir else [])]
    return f"{', '.join(parts)}: {size(checked.disk)} of {size(checked.free)} free"


def _merge(checked: Checked) -> str:
    if checked.merges is None:
        return "looked at when the base is on this machine"
    return f"all {checked.matrices} trained matrices have a place in the base's checkpoint"
