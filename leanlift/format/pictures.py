"""Small pictures out of characters: a bar, a line of losses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

EIGHTHS = " ▏▎▍▌▋▊▉"
LEVELS = "▁▂▃▄▅▆▇█"


def bar(part: float, whole: float, width: int = 20) -> str:
    """A bar `width` characters long where part = whole, in steps of an eighth of a character; at
    least a sliver for anything above 0."""
    if whole <= 0 or part <= 0:
        return ""
    eighths = max(1, round(8 * width * min(part / whole, 1.0)))
    full, rest = divmod(eighths, 8)
    return "█" * full + (EIGHTHS[rest] if rest else "")


def sparkline(values: Sequence[float], width: int = 30) -> str:
    """A line of at most `width` characters, each the mean of as many of the values; NaN is a
    space."""
    groups = min(width, len(values))
    ends = [len(values) * i // groups for i in range(groups + 1)] if groups else []
    means = [_mean(values[first:last]) for first, last in itertools.pairwise(ends)]
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)

    def level(mean: float) -> str:
        if not math.isfinite(mean):
            return " "
        return LEVELS[round((len(LEVELS) - 1) * ((mean - low) / span if span else 0))]

    return "".join(map(level, means))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
