"""What a run has measured of its memory, `memory.json`, read as anyone may have written it.

Without torch: what only shows a report starts at once.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from leanlift.errors import UserError
from leanlift.io.bounded import MOST_OF_A_STRANGER
from leanlift.io.files import read_json

REPORT_NAME = "memory.json"
LARGEST = 2**60
PER_ENTRY = ("index", "values", "optimizer state")


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


KEPT = "kept"
"""The key of `run.json` under which a run says what became of the rows that it was to keep."""

MOST_KEPT, LONGEST_KEPT = 32, 200


@dataclass(frozen=True)
class KeptLoss:
    """What became of rows that were to be kept.

    Attributes:
        name: of the rows.
        rows, tokens: how many; tokens that count in the loss.
        before, after: mean loss per token of the base, and of what was trained.
        change: how much larger that is.
        error: the standard error of the change over the rows; None: there is one row.
    """

    name: str
    rows: int
    tokens: int
    before: float
    after: float
    change: float
    error: float | None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; null where a loss is not finite, for which JSON has no form."""
        held = asdict(self)
        numbers = {key: value for key, value in held.items() if isinstance(value, float)}
        return {**held, **{k: None for k, v in numbers.items() if not math.isfinite(v)}}


def kept_in(run: Any) -> list[KeptLoss]:
    """What a run.json, which anyone may have written, says of the rows that were to be kept; what
    is no such thing is left out."""
    found = run.get(KEPT) if isinstance(run, dict) else None
    listed = found[:MOST_KEPT] if isinstance(found, list) else []
    return [kept for kept in map(_kept, listed) if kept is not None]


def _kept(given: Any) -> KeptLoss | None:
    keys = [each.name for each in fields(KeptLoss)]
    if not isinstance(given, dict) or not all(key in given for key in keys):
        return None
    sizes, losses = (given["rows"], given["tokens"]), [given[k] for k in keys[3:6]]
    losses += [] if given["error"] is None else [given["error"]]
    named = is_line(given["name"]) and len(given["name"]) <= LONGEST_KEPT
    fine = named and all(map(_is_size, sizes)) and all(map(_is_loss, losses))
    return KeptLoss(**{key: given[key] for key in keys}) if fine else None


def _is_loss(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e6


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
        "the device's bytes": data.get("capacity") is None or _is_size(data["capacity"]),
        "a count of entries": data.get("entries") is None or _is_size(data["entries"]),
        "notes as lines of text": _is_lines(data.get("notes", [])),
        "versions by name": _is_names(data.get("versions") or {}),
        "a plan of bytes by category and by phase": plan is None or _is_plan(plan),
    }
    wrong = next((what for what, holds in tests.items() if not holds), None)
    if wrong is None and data.get("entries") and categories:
        lacking = [name for name in PER_ENTRY if name not in categories]
        wrong = f"bytes of {lacking[0]}" if lacking else None
    return wrong


def is_line(text: Any) -> bool:
    """One line that a terminal can be shown."""
    return isinstance(text, str) and len(text) <= 4096 and text.isprintable()


def _is_lines(lines: Any) -> bool:
    return isinstance(lines, list) and all(map(is_line, lines))


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def _is_bytes_by_name(sizes: Any) -> bool:
    return isinstance(sizes, dict) and all(is_line(k) and _is_size(v) for k, v in sizes.items())


def _is_names(names: Any) -> bool:
    return isinstance(names, dict) and all(is_line(k) and is_line(v) for k, v in names.items())


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


@dataclass(frozen=True)
class Difference:
    """A planned and a measured size.

    Attributes:
        name: of the category or phase.
        planned: None where there is no plan for the same thing.
        measured: bytes.
        within: whether the plan is an upper bound that holds.
        off: (planned - measured) / measured; None where that says nothing: nothing was planned, or
            a bound that holds, or the size is small.
    """

    name: str
    planned: int | None
    measured: int
    within: bool
    off: float | None


SMALLEST_COMPARED = 2**20
"""Bytes; below, a share says nothing of a plan: nobody runs out of memory there."""

BOUNDS = ("retired entries", "load", "select", "refresh", "export")
"""What is planned at its most."""

WITHIN_TRAINING = ("train", "refresh", "evaluate", "generate")
"""Phases of a plan that a CUDA device's one peak of training covers."""


def categories_compared(report: dict[str, Any]) -> list[Difference]:
    """The training step's categories that there are, planned against measured, and their sum as
    "peak"."""
    plan = report.get("plan") or {"categories": {}}
    planned: dict[str, int] = plan["categories"]
    measured: dict[str, int] = report["categories"]
    rows = [
        _difference(name, planned.get(name), nbytes)
        for name, nbytes in measured.items()
        if nbytes or planned.get(name)
    ]
    if not rows:
        return []
    total = sum(planned.get(name, 0) for name in measured) if planned else None
    return [*rows, _difference("peak", total, sum(measured.values()))]


def phases_compared(report: dict[str, Any]) -> list[Difference]:
    """The phases whose peak was measured, planned against measured where both are of the same
    thing: on a CPU what the loader holds in between is not followed, and a merge is planned for
    the CPU."""
    plan = report.get("plan") or {"phases": {}}
    planned: dict[str, int] = dict(plan["phases"])
    if report["device"] == "cpu":
        planned.pop("load", None)
    else:
        planned.pop("export", None)
        if "train" in planned:
            planned["train"] = max(planned.get(part, 0) for part in WITHIN_TRAINING)
    return [
        _difference(name, planned.get(name), peak["tensors"])
        for name, peak in report["phases"].items()
        if peak["tensors"] is not None
    ]


def _difference(name: str, planned: int | None, measured: int) -> Difference:
    if planned is None or measured < SMALLEST_COMPARED:
        return Difference(name, planned, measured, False, None)
    if name in BOUNDS and measured <= planned:
        return Difference(name, planned, measured, True, None)
    return Difference(name, planned, measured, False, (planned - measured) / measured)


def difference(row: Difference) -> str:
    """How far a plan was off: "+0.3 %", "within" a bound, "–" where that says nothing."""
    if row.off is None:
        return "within" if row.within else "–"
    percent = 100 * row.off
    if abs(percent) < 0.05:
        return "0 %"
    return f"{percent:+.1f} %" if abs(percent) < 9.95 else f"{percent:+.0f} %"
