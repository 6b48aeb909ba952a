"""A run's report as text: 80 columns, numbers of three digits."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import Any

from leanlift.format import bar, count, duration, kept_words, loss, share, size, sparkline, table
from leanlift.io.measured import Difference, categories_compared, difference, phases_compared
from leanlift.report.adapter import AdapterFacts
from leanlift.report.data import Curve, Points, Run

WIDTH = 80
LABEL = 18  # columns of what stands before a text
MOST_REFRESHES = 6
LONGEST_NOTE = 320
FORMATS = {
    "nf4+double": "NF4 with double quantization",
    "nf4": "NF4",
    "fp4+double": "FP4 with double quantization",
    "fp4": "FP4",
    "int8": "INT8",
}


def report_text(run: Run) -> str:
    """The report of one run."""
    lines = [f"{run.directory}", ""]
    if run.adapter is not None:
        lines += _adapter(run.adapter)
    if run.curve is not None:
        lines += _curve(run.curve)
    for i, kept in enumerate(run.kept):
        lines += labelled("kept" if not i else " ", kept_words(kept))
    if run.memory is not None:
        lines += _times(run.memory)
        lines += ["", *memory_table(run.memory), "", *_phases(run.memory)]
        lines += _notes(run.memory, run.curve)
    lines += [line for text in run.missing for line in ("", *wrapped(text))]
    lines += ["", f"With curves and maps: leanlift report {run.directory} --html"]
    return "\n".join(line.rstrip() for line in lines)


CHOSEN = {
    "principal": "those that are largest after a low-rank approximation",
    "magnitude": "the largest ones",
    "random": "chosen at random",
    "gradient": "those with the largest gradients",
}


def chosen_words(selector: str) -> str:
    """Which entries are trained, by the name of the selector."""
    return CHOSEN.get(selector, f"chosen by {selector}")


def format_words(formats: Sequence[str]) -> str:
    """Storage formats as a reader knows them: "NF4 with double quantization"."""
    return " and ".join(FORMATS.get(name, name) for name in formats)


def refresh_words(curve: Curve) -> str:
    """All refreshes of a run in a sentence."""
    done = curve.refreshes
    changed = ", ".join(share(refresh.churn) for refresh in done[-MOST_REFRESHES:])
    last = "" if len(done) <= MOST_REFRESHES else f"(the last {MOST_REFRESHES}) "
    text = f"{len(done)}, each of which exchanged {last}{changed} of the trained entries"
    if len(done) == 1:
        text = f"1, which exchanged {changed} of the trained entries"
    if done[-1].retired:
        text += f"; {count(done[-1].retired)} are retired: no longer trained, their offsets kept"
    held = sum(refresh.held_back for refresh in done)
    if held:
        text += f"; {count(held)} newcomers found no room (retired_limit)"
    return text + "."


def units(text: str) -> str:
    """A number and its unit stay on one line."""
    return re.sub(r"(?<=\d) (?=(?:%|[KMGT]iB|B|k|M|T|s|min|h)(?:\W|$))", "\u00a0", text)


def wrapped(text: str, label: str = "") -> list[str]:
    """Lines of at most 80 columns; paths are not broken, nor numbers from their units."""
    indent = " " * LABEL if label else ""
    lines = textwrap.wrap(
        units(text),
        WIDTH,
        initial_indent=f"{label:<{LABEL}}" if label else "",
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )
    return [line.replace("\u00a0", " ") for line in lines]


def labelled(label: str, text: str) -> list[str]:
    """A label, and text that goes on below itself."""
    return wrapped(text, label)


def _adapter(adapter: AdapterFacts) -> list[str]:
    trained = (
        f"{count(adapter.entries)} entries, {share(adapter.entries, adapter.weights)} of "
        f"{len(adapter.matrices)} matrices: {chosen_words(adapter.selector)}"
    )
    return [
        *labelled("base", f"{adapter.base}, held in {format_words(adapter.formats)}"),
        *labelled("trained", trained),
    ]


def _curve(curve: Curve) -> list[str]:
    lines = []
    for label, points in (("loss", curve.loss), ("evaluation loss", curve.eval_loss)):
        if points:
            lines += [f"{label:<{LABEL}}{_course(points)}"]
    if curve.refreshes:
        lines += labelled("refreshes", refresh_words(curve))
    return lines


def _course(points: Points) -> str:
    first, last = points[0][1], points[-1][1]
    steps = f"{points[0][0]:.0f} to {points[-1][0]:.0f}"
    if len(points) == 1:
        return f"{loss(first)} at step {points[0][0]:.0f}"
    line = sparkline([value for _, value in points], 24)
    return f"{f'{loss(first)} → {loss(last)}':<16}{line}  steps {steps}"


def _times(memory: dict[str, Any]) -> list[str]:
    phases = memory["phases"]
    if not phases:
        return []
    times = ", ".join(f"{name} {duration(peak['seconds'])}" for name, peak in phases.items())
    return labelled("time", times)


def memory_table(memory: dict[str, Any]) -> list[str]:
    """What the peak of training was made of, as a table of 80 columns."""
    rows = categories_compared(memory)
    if not rows:
        return ["The memory of training by category was not measured."]
    *parts, peak = rows
    largest = max(part.measured for part in parts)
    planned = peak.planned is not None
    head = ["memory at the peak", "measured", "share", ""]
    cells = [
        [
            part.name,
            size(part.measured),
            share(part.measured, peak.measured),
            f"{bar(part.measured, largest, 14):<14}",
            *_planned(part, planned),
        ]
        for part in parts
    ]
    cells.append(["peak", size(peak.measured), "", "", *_planned(peak, planned)])
    capacity = memory.get("capacity")
    where = "this machine's memory" if memory["device"] == "cpu" else memory["device"][:40]
    of = (
        [f"The peak takes {share(peak.measured, capacity)} of {where} ({size(capacity)})."]
        if capacity
        else []
    )
    return [*table(cells, head + (["planned", "off"] if planned else [])), *of]


def _phases(memory: dict[str, Any]) -> list[str]:
    rows = phases_compared(memory)
    if not rows:
        return []
    planned = any(row.planned is not None for row in rows)
    cells = [[row.name, size(row.measured), *_planned(row, planned)] for row in rows]
    return table(cells, ["peak by phase", "measured", *(["planned", "off"] if planned else [])])


def _planned(row: Difference, shown: bool) -> list[str]:
    if not shown:
        return []
    return [size(row.planned), difference(row)]


def _notes(memory: dict[str, Any], curve: Curve | None) -> list[str]:
    """What the run noted; its refreshes where the curve does not tell them better."""
    told = curve is not None and bool(curve.refreshes)
    notes = [n for n in memory.get("notes", []) if not (told and n.startswith("refresh:"))]
    short = [note if len(note) <= LONGEST_NOTE else note[:LONGEST_NOTE] + " …" for note in notes]
    return [line for note in short[:8] for line in ("", *wrapped(note))]
