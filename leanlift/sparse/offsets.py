"""Offsets at positions: what a layer learns, an adapter holds, and a merge adds to rows.

There is one type for them, `Offsets`, whole or of a range of rows, and one function that adds them
to dense rows, `add_offsets_`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leanlift.errors import UserError
from leanlift.sparse.index import DECODE_ROWS, SegmentedIndex


@dataclass(frozen=True)
class Offsets:
    """`scale` times `values` [k] at the positions of `index`."""

    index: SegmentedIndex
    values: Tensor
    scale: float = 1.0

    @classmethod
    def from_flat(cls, flat: Tensor, values: Tensor, shape: tuple[int, int]) -> Offsets:
        """At sorted, distinct flat positions int64 [k] of an m x n matrix.

        Raises:
            ValueError: positions out of range, unsorted or duplicated.
        """
        return cls(SegmentedIndex.from_flat(flat, shape), values)

    @property
    def count(self) -> int:
        """k."""
        return self.index.count

    @property
    def nbytes(self) -> int:
        return self.index.nbytes + self.values.nbytes

    def rows(self, start: int, stop: int) -> Offsets:
        """Those of rows `start:stop`; nothing is copied."""
        if start == 0 and stop == self.index.shape[0]:
            return self
        first, last = self.index.span(start, stop)
        return Offsets(self.index.part(start, stop), self.values[first:last], self.scale)

    def to(self, device: torch.device) -> Offsets:
        """The same on a device."""
        return Offsets(self.index.to(device), self.values.to(device), self.scale)


@dataclass(frozen=True)
class LayerOffsets:
    """What one matrix has learned: the entries that train, and those that did; None: none did.

    No position is in both.
    """

    active: Offsets
    retired: Offsets | None = None

    @property
    def stores(self) -> tuple[Offsets, ...]:
        """The active entries, and the retired ones where there are any."""
        return (self.active,) if self.retired is None else (self.active, self.retired)

    @property
    def count(self) -> int:
        """Entries in all."""
        return sum(store.count for store in self.stores)

    def rows(self, start: int, stop: int) -> LayerOffsets:
        """What rows `start:stop` have learned; nothing is copied."""
        retired = None if self.retired is None else self.retired.rows(start, stop)
        return LayerOffsets(self.active.rows(start, stop), retired)

    def check_disjoint(self, what: str) -> None:
        """Refuse entries that are active and retired at once: they would count twice, and a
        refresh could not tell which of the two to keep.

        Raises:
            UserError: there are some; `what` says where.
        """
        both = 0 if self.retired is None else common(self.active.index, self.retired.index)
        if both:
            raise UserError(f"{what} has {both} entries that are both active and retired.")

    def add_to_(self, rows: Tensor, start: int, stop: int) -> None:
        """Add all offsets of rows `start:stop` to `rows` [stop - start, n], in place."""
        for store in self.stores:
            add_offsets_(rows, store.rows(start, stop))


def common(one: SegmentedIndex, other: SegmentedIndex) -> int:
    """How many positions two sets of one matrix have in common, counted by ranges of rows."""
    found = 0
    for start in range(0, one.shape[0], DECODE_ROWS):
        stop = min(start + DECODE_ROWS, one.shape[0])
        places = find_positions(one.decode(start, stop), other.decode(start, stop))
        found += int((places >= 0).sum())
    return found


def find_positions(haystack: Tensor, needles: Tensor) -> Tensor:
    """Place of each needle in the sorted haystack, -1 where it is absent."""
    if not haystack.numel():
        return torch.full_like(needles, -1)
    place = torch.searchsorted(haystack, needles).clamp_(max=haystack.numel() - 1)
    return torch.where(haystack[place] == needles, place, -1)


def add_offsets_(rows: Tensor, offsets: Offsets) -> None:
    """Add the offsets of a range of rows to these rows, contiguous [r, n], in place.

    Products with the scale and sums are formed in fp32 (or in fp64, where either side is); a sum is
    rounded once to the dtype of `rows`.
    """
    if not offsets.count:
        return
    values, entries = offsets.values, rows.view(-1)
    if offsets.scale != 1:
        values = values.to(torch.promote_types(values.dtype, torch.float32)) * offsets.scale
    flat = offsets.index.to_flat()
    is_wide = rows.dtype in (torch.float32, torch.float64)
    if rows.dtype == values.dtype and (is_wide or rows.device.type == "cpu"):
        # positions are distinct: the same sums in one pass; a CPU adds 16-bit numbers in fp32
        entries.index_add_(0, flat, values)
        return
    wide = torch.float64 if torch.float64 in (rows.dtype, values.dtype) else torch.float32
    # index_select and index_copy_ take half the time of indexing on a CPU
    patched = entries.index_select(0, flat).to(wide) + values.to(wide)
    entries.index_copy_(0, flat, patched.to(rows.dtype))
