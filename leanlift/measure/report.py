"""The memory report as text and as JSON."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from leanlift.format import count, duration, share, short_name, size, table
from leanlift.io.measured import (
    PER_ENTRY,
    REPORT_NAME,
    categories_compared,
    difference,
    phases_compared,
)
from leanlift.io.tensors import replacing, write_json
from leanlift.measure.meter import MemoryReport
from leanlift.measure.picture import draw


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
    plan, total = report.get("plan"), sum(categories.values())
    cells = [
        (
            "peak of training" if row.name == "peak" else row.name,
            size(row.measured),
            share(row.measured, total),
            size(row.planned),
            difference(row),
        )
        for row in categories_compared(report)
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
    cuda, compared = report["device"] != "cpu", {row.name: row for row in phases_compared(report)}
    cells = [
        (
            PHASES.get(name, name),
            duration(peak["seconds"]),
            size(peak["tensors"]),
            size(compared[name].planned) if name in compared else "–",
            difference(compared[name]) if name in compared else "–",
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
