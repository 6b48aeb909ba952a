"""The memory report as text and as JSON."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from leanlift.checkpoint import replacing, write_json
from leanlift.measured import PER_ENTRY, REPORT_NAME
from leanlift.memory.measure import MemoryReport
from leanlift.memory.picture import draw

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
        draw({**bars, "measured": data["categories"]}, path.with_suffix(".png"))
    return path


def markdown_report(report: dict[str, Any]) -> str:
    """The report for a reader: its tables as fixed-width text under a heading."""
    return f"# Memory of this run\n\n```\n{format_report(report)}\n```\n"


def compare(report: dict[str, Any]) -> list[str]:
    """Plan against measurement: bytes by category and by phase, and the difference."""
    plan = report.get("plan")
    if not plan:
        return []
    heading = f"{'plan against measured':<28}{'planned':>14}{'measured':>14}{'difference':>14}"
    lines = ["", heading]
    for name, measured in report["categories"].items():
        lines.append(_difference(name, plan["categories"].get(name, 0), measured))
    for name, peak in report["phases"].items():
        if name == "export" and report["device"] != "cpu":
            continue  # planned for the CPU, measured on the card
        if name in plan["phases"] and peak["tensors"] is not None:
            planned = plan["phases"][name]
            if (
                name == "train" and report["device"] != "cpu"
            ):  # measured over all that training does
                planned = max(plan["phases"].get(part, 0) for part in ("train", *WITHIN_TRAINING))
            lines.append(_difference(f"phase {name}", planned, peak["tensors"]))
    return lines


def _fragmentation(peak: dict[str, Any]) -> str:
    """What CUDA's allocator reserved beyond the tensors' peak."""
    if not peak["reserved"] or not peak["tensors"]:
        return ""
    return f"  {peak['reserved'] / peak['tensors'] - 1:.1%} reserved beyond the peak"


def _difference(name: str, planned: int, measured: int) -> str:
    share = f"{planned / measured - 1:+.1%}" if measured else "-"
    return f"{name:<28}{human(planned):>14}{human(measured):>14}{share:>14}"


def format_report(report: dict[str, Any]) -> str:
    """Two tables: the training step by category, and the peak of each phase."""
    lines = []
    categories: dict[str, int] = report["categories"]
    if categories:
        total = sum(categories.values())
        lines += [f"{'training step':<28}{'bytes':>16}{'':>12}{'share':>8}"]
        lines += [
            f"{name:<28}{nbytes:>16,}{human(nbytes):>12}{nbytes / max(1, total):>8.1%}"
            for name, nbytes in categories.items()
        ]
        lines += [f"{'peak':<28}{total:>16,}{human(total):>12}{1:>8.0%}"]
        if report.get("entries"):
            entries = report["entries"]
            per_entry = {name: categories[name] / entries for name in PER_ENTRY}
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
            + _fragmentation(peak)
        )
    lines += compare(report)
    lines += ["", f"device: {report['device']}", *report.get("notes", [])]
    return "\n".join(lines)


def format_plan(plan: dict[str, Any]) -> str:
    """The plan as text: the training step by category, the peak of each phase, which cards."""
    categories: dict[str, int] = plan["categories"]
    total = sum(categories.values())
    lines = [f"{plan['model']}: {plan['entries']:,} trained entries", ""]
    lines += [f"{'training step, planned':<28}{'bytes':>16}{'':>12}{'share':>8}"]
    lines += [
        f"{name:<28}{nbytes:>16,}{human(nbytes):>12}{nbytes / total:>8.1%}"
        for name, nbytes in categories.items()
        if nbytes
    ]
    lines += [f"{'peak of training':<28}{total:>16,}{human(total):>12}", ""]
    lines += [f"{'on top of what stays':<28}{'bytes':>16}"]
    lines += [
        f"{name:<28}{nbytes:>16,}{human(nbytes):>12}" for name, nbytes in plan["step"].items()
    ]
    lines += [""]
    for name, nbytes in plan["phases"].items():
        where = " (on the CPU)" if name == "export" else ""
        lines.append(f"{'phase ' + name:<28}{nbytes:>16,}{human(nbytes):>12}{where}")
    lines += [
        "",
        f"peak: {plan['peak_phase']}, {human(plan['peak'])}; with {human(plan['context'])} for the "
        f"CUDA context: {human(plan['needed'])}",
        "fits: "
        + ", ".join(f"{c} GB {'yes' if fits else 'no'}" for c, fits in plan["fits_gib"].items()),
    ]
    return "\n".join([*lines, *plan["notes"]])


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
