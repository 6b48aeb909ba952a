"""Where the entries of a mask lie once its columns are sorted: what a product need not form.

Principal entries crowd in rows and columns. Columns are sorted by their number of entries, the most
first, and cut into strips of 128; of each strip those rows are listed that have entries in it. The
entries of a product are then in the products of listed rows with strips; the rest is not needed.
How much that is of real masks, and why a list for each strip and not tiles of sorted rows and
columns: `benchmarks/mask_tiles.py`.

All of it follows from the index: it is made once for a mask, and never saved.

Shapes: m rows, n columns, k entries, S = ceil(n / 128) strips, G groups of 128 listed rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

STRIP = 128
"""Columns of a strip."""
GROUP = 128
"""Rows of a strip that are formed at once."""
NO_ROW = -1

Pieces = Callable[[], Iterable[tuple[int, Tensor]]]
"""Goes over a mask by ranges of rows: the first row, and positions relative to it, int64."""


@dataclass(frozen=True)
class Strips:
    """The rows of each strip of sorted columns that hold entries.

    Attributes:
        order: int32 [128 S], the columns as they are sorted; the last one is repeated at the end of
            the last strip.
        ranks: int32 [n], where each column has come to.
        rows: int16, int32 where m needs it, [G, 128]: rows with entries, in groups of one strip
            each, ascending; -1 where a strip has no more.
        strips: int32 [G], the strip of each group, ascending.
    """

    order: Tensor
    ranks: Tensor
    rows: Tensor
    strips: Tensor

    @classmethod
    def of(cls, shape: tuple[int, int], device: torch.device, pieces: Pieces) -> Strips:
        """Of a mask [m, n]. Asks the device once how many groups there are.

        Temporary memory: that of a piece's positions a few times, and m * S bytes.
        """
        m, n = shape
        counts = torch.zeros(n, dtype=torch.int64, device=device)
        for _, flat in pieces():
            counts += torch.bincount(flat % n, minlength=n)
        order = counts.argsort(descending=True, stable=True)
        ranks = torch.empty_like(order)
        ranks[order] = torch.arange(n, device=device)
        held = torch.zeros(-(-n // STRIP), m, dtype=torch.bool, device=device)
        for first, flat in pieces():
            held[ranks[flat % n] // STRIP, first + flat // n] = True
        rows, strips = _listed(held)
        padded = torch.cat([order, order[-1:].expand(-n % STRIP)])
        return cls(padded.int(), ranks.int(), rows, strips)

    @property
    def width(self) -> int:
        """Columns of all strips, 128 S."""
        return self.order.numel()

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.order, self.ranks, self.rows, self.strips))

    @property
    def formed(self) -> int:
        """Entries of the product that are formed; groups are formed whole."""
        return self.rows.numel() * STRIP


def _listed(held: Tensor) -> tuple[Tensor, Tensor]:
    """`Strips.rows` and `Strips.strips`, from whether each row has entries in each strip: bool
    [S, m]."""
    m, device = held.shape[1], held.device
    groups = -(-held.sum(1) // GROUP)
    first = groups.cumsum(0) - groups
    strip, row = held.nonzero().unbind(1)
    place = held.cumsum(1)[strip, row] - 1 + first[strip] * GROUP
    count = int(groups.sum())
    dtype = torch.int16 if m <= torch.iinfo(torch.int16).max else torch.int32
    rows = torch.full((count * GROUP,), NO_ROW, dtype=dtype, device=device)
    rows[place] = row.to(dtype)
    every = torch.arange(held.shape[0], dtype=torch.int32, device=device)
    return rows.view(count, GROUP), torch.repeat_interleave(every, groups, output_size=count)


def strips_nbytes(shape: tuple[int, int], count: int) -> int:
    """The most bytes that `Strips` of a mask take, from shapes alone: rows are listed once for each
    entry at most, and in each strip once; a strip's last group may be all but empty."""
    m, n = shape
    strips = -(-n // STRIP)
    groups = min(strips * -(-m // GROUP), count // GROUP + min(strips, count))
    item = 2 if m <= torch.iinfo(torch.int16).max else 4
    return 4 * (strips * STRIP + n) + groups * (GROUP * item + 4)
