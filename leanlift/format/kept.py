"""What became of rows that training was to keep, in words."""

from __future__ import annotations

from leanlift.format.numbers import change, loss
from leanlift.io.measured import KeptLoss


def kept_words(kept: KeptLoss) -> str:
    """ "prose.txt: 2.31 before, 2.35 after (+0.041 ± 0.012)"."""
    both = f"{loss(kept.before)} before, {loss(kept.after)} after"
    return f"{kept.name}: {both} ({change(kept.change, kept.error)})"
