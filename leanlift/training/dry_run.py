"""All of a run but the run: what can be wrong with it is found without loading or training.

Settings, rows, tokenizer and output directory are looked at as `run` does it. On top of that comes
what a run would find out later, or at its end: whether the plan fits the card, whether the disk has
room for the checkpoints and the merge, and whether every trained matrix has a place to be merged
into.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from leanlift.data.dataset import TokenRows
from leanlift.format import count, size
from leanlift.plan import MemoryPlan, peak_line
from leanlift.source import check_matrix_homes
from leanlift.training.arguments import LiftSFTConfig, RunArguments
from leanlift.training.batches import Batches
from leanlift.training.inputs import ReadyRows
from leanlift.training.interrupt import Interrupt
from leanlift.training.job import Job, look_at_input
from leanlift.training.plan import layout_of_base, targets_of
from leanlift.training.room import check_room, disk_nbytes, free_nbytes, kept, steps_of
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
        check_room(args, sft, job.plan, ready.data, job.output, card)
        with screen.phase("Looking for a place for every matrix"):
            images = ready.processor is not None
            targets = targets_of(args, sft, images)
            merges = _check_merge(args, sft, targets, images)
    steps = steps_of(ready.data, sft)
    needed, free = disk_nbytes(args, sft, job.plan, steps), free_nbytes(job.output)
    checked = Checked(steps, job.plan, len(targets), merges, needed, free)
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
        lines += [INDENT + note for note in report.notes]
    for rows_kept in ready.kept:
        named = f"{rows_kept.name}: {count(len(rows_kept.data))} rows"
        lines.append(f"Kept    the loss on {named} is measured")
    lines += [f"Memory  {line}" if not n else INDENT + line for n, line in _numbered(checked, card)]
    lines.append(f"Disk    {_disk(args, sft, checked)}")
    lines.append(f"Merge   {_merge(checked)}")
    lines.append(f"Output  {sft.output_dir} is free")
    return [line[:80] for line in lines]


def _check_merge(
    args: RunArguments,
    sft: LiftSFTConfig,
    targets: dict[str, tuple[int, int]],
    images: bool,
) -> bool | None:
    """Whether what is trained can be merged; None: the checkpoint is not here.

    Raises:
        UserError: it cannot.
    """
    place = Path(args.model_name_or_path)
    if not place.is_dir():
        return None
    check_matrix_homes(targets, place, layout_of_base(args, sft, place, images))
    return True


# --- words ------------------------------------------------------------------------------------


def _numbered(checked: Checked, card: float | None) -> list[tuple[int, str]]:
    plan = checked.plan
    if plan is None:
        return [(0, "cannot be planned for this model")]
    free = "" if card is None else f", {size(card - plan.needed)} of the card stay free"
    lines = [f"needs {size(plan.needed)}{free}", *peak_line(plan.to_dict(), 72)]
    return list(enumerate(lines))


def _disk(args: RunArguments, sft: LiftSFTConfig, checked: Checked) -> str:
    number = kept(sft, checked.steps)
    parts = [f"{number} checkpoint{'s' * (number != 1)}"] if number else []
    parts += ["the adapter", *(["the merged model"] if args.merged_dir else [])]
    return f"{', '.join(parts)}: {size(checked.disk)} of {size(checked.free)} free"


def _merge(checked: Checked) -> str:
    if checked.merges is None:
        return "looked at when the base is on this machine"
    return f"all {checked.matrices} trained matrices have a place in the base's checkpoint"
