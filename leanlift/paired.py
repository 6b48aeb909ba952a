"""What two models make of the same rows: the difference of their means, and its standard error.

The same rows are in both, so what makes one row harder than another is in neither's favour, and a
difference can be told that is far smaller than the spread of the rows. A mean over tokens is a sum
over rows by another sum over rows, so the error is that of a ratio, with a row as the unit: tokens
of one row are not independent. A bootstrap over rows gives the same in the long run, and another
figure each time.
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
    """

    mean: float
    error: float | None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)


def change(
    before: Sequence[float], after: Sequence[float], counts: Sequence[int] | None = None
) -> Change | None:
    """How the mean of `after` differs from that of `before`.

    Args:
        before, after: a sum per row, of the same rows.
        counts: of what each is a sum, such as tokens; None: of one thing. Rows of none count for
            nothing.

    Returns:
        None where there is nothing to compare.
    """
    counts = [1] * len(before) if counts is None else counts
    rows = [(b - a, n) for a, b, n in zip(before, after, counts, strict=True) if n]
    if not rows:
        return None
    total = sum(n for _, n in rows)
    mean = math.fsum(d for d, _ in rows) / total
    if len(rows) < 2:
        return Change(mean, None)
    spread = math.fsum((d - mean * n) ** 2 for d, n in rows)
    return Change(mean, math.sqrt(spread * len(rows) / (len(rows) - 1)) / total)
