"""What a run tells of itself: facts for its screen, notes for its report, settings for readers."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.compute as pc  # type: ignore[import-untyped]
import torch
from datasets import Dataset, IterableDataset

from leanlift._version import __version__
from leanlift.adapters import WEIGHTS_NAME
from leanlift.data.dataset import TokenRows
from leanlift.data.tokens import IGNORED, ROW_KEYS
from leanlift.export import TRAINING_KEYS
from leanlift.format import count, share
from leanlift.io.measured import KEPT, KeptLoss
from leanlift.io.places import export_words
from leanlift.measure import MemoryMeter, human, machine_nbytes, resident_now
from leanlift.methods import SFT
from leanlift.model import RefreshReport, lift_layers, lift_state, weights_of
from leanlift.plan import MemoryPlan
from leanlift.processes import processes
from leanlift.training.arguments import LiftSFTConfig, RunArguments
from leanlift.training.inputs import ReadyRows
from leanlift.training.memory import MemoryCallback
from leanlift.training.out_of_memory import card_nbytes
from leanlift.training.screens import FirstRow, Header, Memory, Place
from leanlift.training.screens.words import shell

logger = logging.getLogger("leanlift")

# --- for the screen ------------------------------------------------------------------------


def first_row_of(ready: ReadyRows, tokenizer: Any) -> FirstRow | None:
    """The first row as it is trained; None where there is none to look at."""
    if ready.first is not None:
        return marked(ready.first.ids, ready.first.labels, tokenizer)
    rows = ready.rows
    data = rows.data if isinstance(rows, TokenRows) else rows
    row = next(iter(data), None) if isinstance(data, (Dataset, IterableDataset)) else None
    if row is None or not {"input_ids", "labels"} <= row.keys():
        return None
    return marked(row["input_ids"], row["labels"], tokenizer)


def marked(ids: list[int], labels: list[int], tokenizer: Any) -> FirstRow:
    """Tokens as text, and which parts of it are trained."""
    trained = [label != IGNORED for label in labels]
    trained[:1] = [False]  # nothing predicts the first token
    ends = [i for i in range(1, len(ids)) if trained[i] != trained[i - 1]]
    parts, text = [], ""
    for start, stop in zip([0, *ends], [*ends, len(ids)], strict=True):
        whole = tokenizer.decode(ids[:stop])
        part = whole[len(text) :] if whole.startswith(text) else tokenizer.decode(ids[start:stop])
        parts.append((part, trained[start]))
        text = whole
    return FirstRow(tuple(parts), len(ids), sum(trained))


def header_of(
    args: RunArguments, trainer: Any, ready: ReadyRows, plan: MemoryPlan | None, cuda: bool
) -> Header:
    """The facts of a run whose trainer knows its steps."""
    entries, weights = weights_of(trainer.model)
    data, sft, state = trainer.train_dataset, trainer.args, trainer.state
    batch, accumulate = sft.per_device_train_batch_size, sft.gradient_accumulation_steps
    sized = isinstance(data, Dataset)
    together = batch * processes()
    each = math.ceil(math.ceil(len(data) / together) / accumulate) if sized else 0  # of a pass
    passes = state.max_steps / each if each else 0.0
    report = ready.rows.report if isinstance(ready.rows, TokenRows) else None
    return Header(
        model=args.model_name_or_path,
        entries=entries,
        weights=weights,
        matrices=len(lift_layers(trainer.model)),
        rows=len(ready.data) if sized else None,
        tokens=_tokens(data) if sized else None,
        longest=None if report is None else report.kept,
        steps=state.max_steps,
        begun=state.global_step,
        epochs=passes if sft.max_steps > 0 else sft.num_train_epochs,
        batch=together,
        accumulate=accumulate,
        planned=None if plan is None else plan.needed if cuda else plan.peak,
        room=card_nbytes(True) if cuda else machine_nbytes(),
        place=torch.cuda.get_device_name(0) if cuda else "RAM",
    )


def _tokens(data: Dataset) -> int | None:
    if "input_ids" not in data.column_names:
        return None
    parts = data.select_columns(["input_ids"]).with_format("arrow").iter(1000)
    return sum(pc.sum(pc.list_value_length(part["input_ids"])).as_py() or 0 for part in parts)


def memory_now(callback: MemoryCallback, plan: MemoryPlan | None, cuda: bool) -> Memory:
    """Memory at this moment of training, against what was planned for training."""
    within = ("train", "evaluate", "refresh", "generate") if cuda else ("train",)
    planned = None if plan is None else max(plan.phases.get(phase, 0) for phase in within)
    if cuda:
        return Memory(torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated(), planned)
    return Memory(None, callback.peak, planned, resident_now())


def places_of(output: Path, merged: Path | None) -> tuple[Place, ...]:
    """What a run has written."""
    places = [Place("adapter", str(output), (output / WEIGHTS_NAME).stat().st_size)]
    if merged is not None:
        held = sum(file.stat().st_size for file in merged.iterdir() if file.is_file())
        places.append(Place("merged", str(merged), held))
    return tuple(places)


def next_commands(args: RunArguments, output: Path, images: bool = False) -> tuple[str, ...]:
    """What to run after a run; over rows with images, or of preferences, nothing that evaluates
    them."""
    if images or args.method != SFT:
        more = [] if args.merged_dir else [shell(*export_words(output, args.model_name_or_path))]
        return (shell("leanlift", "report", output), *more)
    own = args.eval_dataset_name is not None
    trained = args.parts()[0]
    rows = ["--data", args.eval_dataset_name or trained.path]
    part = args.eval_dataset_split if own else trained.split
    first = re.fullmatch(r"\w+\[:(\d+)\]", part)  # the only part that eval can be asked for
    rows += ["--limit", first[1]] if first else []
    rows += ["--formatting_func", args.formatting_func] if args.formatting_func else []
    last = (
        shell(*export_words(output, args.model_name_or_path))
        if not args.merged_dir
        else shell("leanlift", "eval", "--model_name_or_path", args.merged_dir, *rows)
    )
    return (
        shell("leanlift", "report", output),
        shell("leanlift", "eval", "--adapter", output, *rows),
        last,
    )


# --- for the report ------------------------------------------------------------------------


def note_refreshes(refreshes: list[RefreshReport], meter: MemoryMeter) -> None:
    """Churn and retired entries of each refresh of this process, for the report."""
    if not refreshes:
        return
    last = refreshes[-1]
    churn = ", ".join(share(report.churn) for report in refreshes[-10:])
    shown = "" if len(refreshes) <= 10 else f" (the last 10 of {len(refreshes)})"
    held_back = sum(report.held_back for report in refreshes)
    limited = f", and {count(held_back)} newcomers held back by retired_limit" if held_back else ""
    meter.report.notes.append(
        f"refresh: {len(refreshes)} in {sum(r.seconds for r in refreshes):.1f} s changed {churn} "
        f"of the trained entries{shown}; {count(last.retired)} are retired (no longer trained, "
        f"offset kept) in {human(last.retired_nbytes)}{limited}."
    )


def note_selection(model: Any, meter: MemoryMeter) -> None:
    """How the selection went, for the report; and what did not converge, for the user."""
    state = lift_state(model)
    unconverged = state.unconverged
    meter.report.notes.append(
        f"selection: {len(state.base.shapes)} matrices in {state.selection_seconds:.1f} s, "
        f"{f'in {len(unconverged)} it did not converge' if unconverged else 'all converged'}."
    )
    if unconverged:
        logger.warning(
            "In %d matrices the choice of trained entries did not converge: at this approx_rank "
            "others would do as well (%s). Training works; for a choice that is the only one, "
            "try another approx_rank.",
            len(unconverged),
            ", ".join(unconverged[:3]) + (", …" if len(unconverged) > 3 else ""),
        )


def settings_for_reader(
    args: RunArguments, sft: LiftSFTConfig, found: Sequence[KeptLoss] = ()
) -> dict[str, Any]:
    """What a reader of the adapter may want to know of the run, JSON-ready; also what was `found`
    of the rows that were to be kept."""
    own = asdict(args)
    parts = [{**asdict(part), "path": _absolute(part.path)} for part in args.parts()]
    own["datasets"] = parts if args.datasets else []
    own["keep_dataset_name"] = [
        {**asdict(part), "path": _absolute(part.path)} for part in args.kept_parts()
    ]
    own["dataset_name"] = "" if args.datasets else _absolute(args.dataset_name)
    loop = sft.to_dict()
    kept = {key: loop[key] for key in (*TRAINING_KEYS, *ROW_KEYS) if key in loop}
    result = {KEPT: [each.to_dict() for each in found]} if found else {}
    return {"leanlift_version": __version__, **own, **kept, **result}


def _absolute(place: str) -> str:
    return str(Path(place).absolute()) if Path(place).is_file() else place
