"""What two models make of the same rows: the difference of their means, and its standard error.

The same rows are in both, so what makes one row harder than another is in neither's favour, and a
difference can be told that is far smaller than the spread of the rows. A mean over tokens is a sum
over rows by another sum over rows, so the error is that of a ratio, with a row as the unit: tokens
of one row are not independent, nor are the turns of one chat. A bootstrap over rows gives the same
in the long run, and another figure each time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Change:
    """A difference of two means over the same rows.

    Attributes:
        mean: how much larger the second one is.
        error: its standard error; None: one row has none.

    Both are NaN where a model gives no finite figure for some of the rows.
    """

    mean: float
    error: float | None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; null for a NaN, for which JSON has no form."""
        held = asdict(self).items()
        return {k: None if v is None or not math.isfinite(v) else v for k, v in held}


def change(
    before: Sequence[float],
    after: Sequence[float],
    counts: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
) -> Change | None:
    """How the mean of `after` differs from that of `before`.

    Args:
        before, after: a sum per row, or per part of a row, of the same rows.
        counts: of what each is a sum, such as tokens; None: of one thing. Rows of none count for
            nothing.
        rows: the number of the row that each is of; None: each is of its own.

    Returns:
        None where there is nothing to compare.
    """
    counts = [1] * len(before) if counts is None else counts
    rows = range(len(before)) if rows is None else rows
    units: dict[int, tuple[float, int]] = {}
    for a, b, n, row in zip(before, after, counts, rows, strict=True):
        if n:
            difference, of = units.get(row, (0.0, 0))
            units[row] = difference + (b - a), of + n
    if not units:
        return None
    each = list(units.values())
    if not all(math.isfinite(d) for d, _ in each):
        return Change(math.nan, math.nan)
    total = sum(n for _, n in each)
    mean = math.fsum(d for d, _ in each) / total
    if len(each) < 2:
        return Change(mean, None)
    spread = math.fsum((d - mean * n) ** 2 for d, n in each)
    return Change(mean, math.sqrt(spread * len(each) / (len(each) - 1)) / total)
