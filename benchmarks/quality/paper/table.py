"""The results as CSV, a row for each method, and as markdown."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import environment
from benchmarks.quality.paper.stages import FACTS
from benchmarks.quality.paper.suites import SUITES
from leanlift.io.tensors import replacing

Row = dict[str, Any]

KEY = ("suite", "method", "learning_rate", "limit")
"""Columns that tell rows apart; a row that is made again takes the place of the old one."""

TESTS = tuple(dict.fromkeys(name for suite in SUITES.values() for name in suite.tests))

COLUMNS = (
    "suite", "method", "model", "settings_of", "held", "learning_rate", "tokens", *FACTS,
    "peak_bytes", "pflop", "text", "loss_before", "loss_after", "forgetting", "limit", *TESTS,
    "mean",
)  # fmt: skip

PUBLISHED = (
    ("Lily", 0.526, None, None, None),
    ("LoRA, r = 64, rank-stabilized", 0.513, None, None, None),
    ("SHiRA, r = 32", 0.510, 0.052, 21.7e9, 6893),
    ("MiSS", 0.487, None, 20.3e9, None),
    ("LoRA, r = 32", 0.478, 0.050, None, None),
    ("full fine-tuning", 0.472, 0.030, 38.9e9, None),
    ("Super-Tuning, 2.6 % of q and v", 0.439, 0.010, 21.6e9, 7330),
)
"""PEFT's own rows on an L40S: accuracy, forgetting, peak bytes of the whole run, tokens a second;
None: not looked up. From `method_comparison/MetaMathQA/results` of its repository, 2026."""


def read(path: Path) -> list[Row]:
    """Rows of a CSV; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Sequence[Row]) -> None:
    """Put rows into a CSV, in the place of those of the same key."""
    made = {key_of(row) for row in rows}
    every = [*(row for row in read(path) if key_of(row) not in made), *rows]
    columns = [*COLUMNS, *environment()]
    with (
        replacing(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(every)


def key_of(row: Row) -> tuple[str, ...]:
    """What a row is known by."""
    return tuple(str(row.get(name, "")) for name in KEY)


def markdown(rows: Sequence[Row], tests: Sequence[str], as_peft: bool) -> str:
    """The rows as a table; beside PEFT's own where they are made as those are."""
    names = [*tests, *(["mean"] if len(tests) > 1 else [])]
    head = ["method", *names, "forgetting", "peak GB", "tokens/s", "trained"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [
            row["method"],
            *(_cell(row.get(name), "{:.3f}") for name in names),
            _cell(row["forgetting"], "{:.3f}"),
            _cell(row["peak_bytes"], "{:.1f}", 1e-9),
            _cell(row["tokens_per_second"], "{:,.0f}"),
            _cell(row["trained"], "{:,.0f}"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if as_peft:
        for name, right, lost, peak, rate in PUBLISHED:
            said = [
                f"*published: {name}*", _cell(right, "{:.3f}"), _cell(lost, "{:.3f}"),
                _cell(peak, "{:.1f}", 1e-9), _cell(rate, "{:,.0f}"), "",
            ]  # fmt: skip
            lines.append("| " + " | ".join(said) + " |")
    return "\n".join(lines)


def _cell(value: Any, form: str, scale: float = 1.0) -> str:
    return "" if value in ("", None) else form.format(float(value) * scale)
