"""The memory report as text and as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from leanlift.checkpoint import read_json, write_json
from leanlift.errors import UserError
from leanlift.memory.measure import MemoryReport

REPORT_NAME = "memory.json"


def save_report(report: MemoryReport, directory: str | Path) -> Path:
    """Write `memory.json` into `directory`."""
    path = Path(directory) / REPORT_NAME
    write_json(path, report.to_dict())
    return path


def load_report(run: str | Path) -> dict[str, Any]:
    """The report of a run directory.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = Path(run) / REPORT_NAME
    if not path.is_file():
        raise UserError(f"{run} holds no {REPORT_NAME}: expected the output_dir of a training run.")
    data = read_json(path)
    if not isinstance(data, dict) or not {"phases", "categories", "device"} <= set(data):
        raise UserError(f"{path} is no memory report: it lacks phases or categories.")
    return data


def format_report(report: dict[str, Any]) -> str:
    """Two tables: the training step by category, and the peak of each phase."""
    lines = []
    categories: dict[str, int] = report["categories"]
    if categories:
        total = sum(categories.values())
        lines += [f"{'training step':<28}{'bytes':>16}{'':>12}{'share':>8}"]
        lines += [
            f"{name:<28}{nbytes:>16,}{human(nbytes):>12}{nbytes / total:>8.1%}"
            for name, nbytes in categories.items()
        ]
        lines += [f"{'peak':<28}{total:>16,}{human(total):>12}{1:>8.0%}"]
        if report.get("entries"):
            entries = report["entries"]
            per_entry = {
                name: categories[name] / entries for name in ("index", "values", "optimizer state")
            }
            lines += [
                "",
                f"{entries:,} trained entries; bytes per entry: "
                + ", ".join(f"{name} {value:.2f}" for name, value in per_entry.items()),
            ]
    lines += ["", f"{'phase':<12}{'seconds':>10}{'tensors':>14}{'reserved':>14}{'resident':>14}"]
    for name, peak in report["phases"].items():
        lines.append(
            f"{name:<12}{peak['seconds']:>10.1f}"
            + "".join(f"{human(peak[key]):>14}" for key in ("tensors", "reserved", "resident"))
        )
    lines += ["", f"device: {report['device']}", *report.get("notes", [])]
    return "\n".join(lines)


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
