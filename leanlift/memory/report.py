"""The memory report as text and as JSON."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from leanlift.bounded import MOST_OF_A_STRANGER
from leanlift.checkpoint import read_json, replacing, write_json
from leanlift.errors import UserError
from leanlift.memory.measure import MemoryReport
from leanlift.memory.picture import draw
from leanlift.screen import count, duration, share, short_name, size, table

REPORT_NAME = "memory.json"
WITHIN_TRAINING = ("refresh", "evaluate")
"""Phases of a plan that come between the steps of training."""


def save_report(report: MemoryReport, directory: str | Path) -> Path:
    """Write `memory.json` and `memory.md` into `directory`, and `memory.png` where matplotlib is
    installed."""
    path = Path(directory) / REPORT_NAME
    data = report.to_dict()
    write_json(path, data)
    with replacing(path.with_suffix(".md")) as temporary:
        temporary.write_text(markdown_report(data), encoding="utf-8")
    if data["categories"] and find_spec("matplotlib") is not None:
        bars = {"planned": data["plan"]["categories"]} if data["plan"] else {}
        bars["measured"] = data["categories"]
        name = f"{short_name(data['plan']['model'])}: m" if data["plan"] else "M"
        draw(bars, path.with_suffix(".png"), f"{name}emory of the training step at its peak")
    return path


def markdown_report(report: dict[str, Any]) -> str:
    """The report for a reader: its tables as fixed-width text under a heading."""
    return f"# Memory of this run\n\n```\n{format_report(report)}\n```\n"


SMALL = 2**20
"""Bytes below which a difference says nothing: of a few allocations, not of a plan."""

BOUNDS = ("retired entries", "load", "select", "refresh", "export")
"""What is planned at its most: measured below, it is within the plan."""


def difference(name: str, planned: int | None, measured: int | None) -> str:
    """How far a plan was off, in words: "+0.3 %", "within", or "–" where the two cannot be
    compared, or are too small for it to mean anything."""
    if planned is None or measured is None or measured < SMALL:
        return "–"
    if name in BOUNDS and measured <= planned:
        return "within"
    off = 100 * (planned / measured - 1)
    return "0 %" if abs(off) < 0.05 else f"{off:+.1f} %" if abs(off) < 9.95 else f"{off:+.0f} %"


def planned_phases(report: dict[str, Any]) -> dict[str, int]:
    """What was planned for each phase, where what was measured is the same thing."""
    plan = report.get("plan") or {"phases": {}}
    phases = dict(plan["phases"])
    if report["device"] == "cpu":
        phases.pop("load", None)  # what the loader held in between was not followed
        return phases
    phases.pop("export", None)  # planned for the CPU, measured on the card
    if "train" in phases:  # measured over all that training does
        phases["train"] = max(phases.get(part, 0) for part in ("train", *WITHIN_TRAINING))
    return phases


def load_report(run: str | Path) -> dict[str, Any]:
    """The report of a run directory.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = Path(run) / REPORT_NAME
    if not path.is_file():
        raise UserError(f"{run} holds no {REPORT_NAME}: expected the output_dir of a training run.")
    data = read_json(path, MOST_OF_A_STRANGER)
    wrong = _wrong_in(data)
    if wrong:
        raise UserError(f"{path} is no memory report: expected {wrong}; run the training again.")
    return data


def _wrong_in(data: Any) -> str | None:
    """What a report, which anyone may have written, does not have as it should; None: nothing."""
    if not isinstance(data, dict):
        return "an object"
    phases, categories, plan = (data.get(key) for key in ("phases", "categories", "plan"))
    tests = {
        "device as a line of text": is_line(data.get("device")),
        "bytes by category": _is_bytes_by_name(categories),
        "peaks by phase": isinstance(phases, dict)
        and all(is_line(name) and _is_peak(peak) for name, peak in phases.items()),
        "a count of entries": data.get("entries") is None or _is_size(data["entries"]),
        "notes as lines of text": _is_lines(data.get("notes", [])),
        "a plan of bytes by category and by phase": plan is None or _is_plan(plan),
    }
    wrong = next((what for what, holds in tests.items() if not holds), None)
    if wrong is None and data.get("entries") and categories:
        lacking = [name for name in PER_ENTRY if name not in categories]
        wrong = f"bytes of {lacking[0]}" if lacking else None
    return wrong


LARGEST = 2**60
PER_ENTRY = ("index", "values", "optimizer state")


def is_line(text: Any) -> bool:
    """One line that a terminal can be shown."""
    return isinstance(text, str) and len(text) <= 4096 and text.isprintable()


def _is_lines(lines: Any) -> bool:
    return isinstance(lines, list) and all(map(is_line, lines))


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def _is_bytes_by_name(sizes: Any) -> bool:
    return isinstance(sizes, dict) and all(is_line(k) and _is_size(v) for k, v in sizes.items())


def _is_peak(peak: Any) -> bool:
    if not isinstance(peak, dict):
        return False
    seconds: Any = peak.get("seconds")
    return (
        type(seconds) in (int, float)
        and 0 <= seconds <= LARGEST
        and all(
            key in peak and (peak[key] is None or _is_size(peak[key]))
            for key in ("tensors", "reserved", "resident")
        )
    )


def _is_plan(plan: Any) -> bool:
    return isinstance(plan, dict) and all(
        _is_bytes_by_name(plan.get(key)) for key in ("categories", "phases")
    )


def format_report(report: dict[str, Any]) -> str:
    """Two tables: the training step by category, and the peak of each phase, each beside what had
    been planned; at most 80 columns."""
    lines = [*_step_table(report), *_phase_table(report)]
    lines += ["", f"Measured on: {report['device']}"]
    return "\n".join([*lines, *report.get("notes", [])])


def _step_table(report: dict[str, Any]) -> list[str]:
    categories: dict[str, int] = report["categories"]
    if not categories:
        return []
    plan = report.get("plan")
    planned: dict[str, int] = plan["categories"] if plan else {}
    total, foreseen = sum(categories.values()), sum(planned.values())
    rows = [
        (name, nbytes, planned.get(name, 0) if plan else None)
        for name, nbytes in categories.items()
        if nbytes or planned.get(name)
    ]
    rows.append(("peak of training", total, foreseen if plan else None))
    cells = [
        (name, size(nbytes), share(nbytes, total), size(before), difference(name, before, nbytes))
        for name, nbytes, before in rows
    ]
    lines = table(cells, ("training step", "measured", "share", "planned", "difference"))
    if plan:
        lines += [
            "",
            "within: below what was planned as the most. –: too small, or not comparable.",
        ]
    if report.get("entries"):
        entries = report["entries"]
        per_entry = (f"{name} {categories[name] / entries:.3g}" for name in PER_ENTRY)
        lines += [f"{count(entries)} trained entries; bytes of each: {', '.join(per_entry)}."]
    return [*lines, ""]


def _phase_table(report: dict[str, Any]) -> list[str]:
    planned, cuda = planned_phases(report), report["device"] != "cpu"
    cells = [
        (
            PHASES.get(name, name),
            duration(peak["seconds"]),
            size(peak["tensors"]),
            size(planned.get(name)),
            difference(name, planned.get(name), peak["tensors"]),
            size(peak["reserved"] if cuda else peak["resident"]),
        )
        for name, peak in report["phases"].items()
    ]
    last = "reserved" if cuda else "process"
    return table(cells, ("phase", "time", "tensors", "planned", "difference", last))


PHASES = {"load": "load the base", "select": "select entries", "export": "merge"}
"""Phases in words, where the name is not one."""


def human(nbytes: int | None) -> str:
    """ "3.4 MiB"; "-" for None."""
    if nbytes is None:
        return "-"
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
