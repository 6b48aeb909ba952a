"""The largest micro-batch of a run: what a step needs is decided by it."""

from __future__ import annotations

from dataclasses import dataclass

from leanlift.format import count
from leanlift.plan.seen import Seen

UNLIMITED = 2048
"""Tokens that a row is taken to have where nothing limits it and nobody has looked."""


@dataclass(frozen=True)
class Batch:
    """Rows of a micro-batch and tokens of each.

    Attributes:
        trained: how many of its tokens are trained; None: not known, perhaps all.
        padded: whether rows are shorter than the longest, which takes a mask.
        seen: of rows with images, what the processor makes of them, or of one that stands for all;
            None: they have none, or nobody has looked.
    """

    rows: int
    tokens: int
    trained: int | None = None
    padded: bool = False
    seen: Seen | None = None

    def __str__(self) -> str:
        text = f"{self.rows} row{'s' * (self.rows != 1)} of {count(self.tokens)} tokens"
        return text if self.trained is None else f"{text}, {count(self.trained)} trained"


def largest_batch(rows: int, max_length: int | None) -> Batch:
    """The largest batch of rows that nobody has looked at: one of them is as long as it may be,
    and several are padded to that. `max_length` None: no limit is set."""
    return Batch(rows, max_length or UNLIMITED, None, padded=rows > 1)
