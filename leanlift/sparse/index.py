"""A compact, exact set of positions in an m x n matrix.

A position costs about 1.1 bytes at 5 % density, against 4 for an int32 and 16 for an (int64,
int64) pair. A row is cut into segments of 255 columns:

    columns  uint8 [k]        column inside its segment, 0..254, in row-major order
    counts   uint8 [m, S]     entries per segment; at most 255, so it fits: S = ceil(n / 255)
    ends     int32 [m]        entries up to and with each row, from the counts: what a kernel needs
    anchors  int64 [A]        entries before every 64th row, kept on the CPU: A = ceil(m / 64) + 1

Segments of 255 columns, not 256, are what lets a full segment's count fit a byte. The anchors
are on the CPU so that the size of a row range that starts and ends at a multiple of 64 is known
without asking the device. The encoding is exact for any mask, empty and full ones included.

A range of rows of an index is an index too, and copies nothing: its `ends` go on counting from the
top of the whole, and `first` says how many entries come before it.

Bytes: k + m * (ceil(n / 255) + 4) + 8 * (ceil(m / 64) + 1); 1.09 k for 4096 x 11008 at 5 %.

Shapes: k entries, m rows, n columns, S segments a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from leanlift.sparse.strips import Strips

SEGMENT = 255
ANCHOR_ROWS = 64
DECODE_ROWS = 1024
ENCODED_AT_ONCE = 2**20
"""Positions; of as many there are a few int64 forms at once."""
NO_ANCHORS = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class SegmentedIndex:
    """A sorted, duplicate-free set of positions of an m x n matrix. Build it with `from_flat`.

    Attributes:
        shape: (m, n).
        columns, counts, ends, anchors: see above; a range of rows has no anchors.
        first: entries of the whole matrix before these rows.
    """

    shape: tuple[int, int]
    columns: Tensor
    counts: Tensor
    ends: Tensor
    anchors: Tensor
    first: int = 0

    @classmethod
    def from_flat(cls, flat: Tensor, shape: tuple[int, int]) -> SegmentedIndex:
        """Encode sorted, distinct flat positions (row * n + column).

        Args:
            flat: int64 [k], strictly increasing, each in 0..m*n-1.
            shape: (m, n).

        Raises:
            ValueError: positions out of range, unsorted or duplicated.
        """
        m, n = shape
        if flat.dim() != 1 or flat.dtype != torch.int64:
            raise ValueError(f"expected 1-D int64 positions, got {flat.dtype} {tuple(flat.shape)}")
        starts = range(0, flat.numel(), ENCODED_AT_ONCE)
        if flat.numel() and not (
            flat[0] >= 0
            and flat[-1] < m * n
            and all(bool((flat[a : a + ENCODED_AT_ONCE + 1].diff() > 0).all()) for a in starts)
        ):
            raise ValueError(f"expected strictly increasing positions in 0..{m * n - 1}")
        segments = -(-n // SEGMENT)
        columns = torch.empty(flat.numel(), dtype=torch.uint8, device=flat.device)
        counts = torch.zeros(m * segments, dtype=torch.uint8, device=flat.device)
        for start in starts:
            row = flat[start : start + ENCODED_AT_ONCE] // n
            column = flat[start : start + ENCODED_AT_ONCE] - row * n
            place = row.mul_(segments).add_(column // SEGMENT)
            columns[start : start + ENCODED_AT_ONCE] = column.remainder_(SEGMENT)
            first = int(place[0])
            found = torch.bincount(place.sub_(first))
            counts[first : first + found.numel()] += found.to(torch.uint8)
        return cls._of(shape, columns, counts.view(m, segments))

    @classmethod
    def full(cls, shape: tuple[int, int], device: torch.device | None = None) -> SegmentedIndex:
        """All positions of a matrix, on a device."""
        m, n = shape
        columns = (torch.arange(n, device=device) % SEGMENT).to(torch.uint8).repeat(m)
        row = torch.full((-(-n // SEGMENT),), SEGMENT, device=device)
        row[-1] = n - (len(row) - 1) * SEGMENT
        return cls._of(shape, columns, row.to(torch.uint8).repeat(m, 1))

    @classmethod
    def empty(cls, shape: tuple[int, int], device: torch.device | None = None) -> SegmentedIndex:
        """No position of a matrix; counts and ends are views of one number each."""
        m, n = shape
        zero = torch.zeros(1, dtype=torch.int32, device=device)
        counts = zero.to(torch.uint8).expand(m, -(-n // SEGMENT))
        anchors = torch.zeros(-(-m // ANCHOR_ROWS) + 1, dtype=torch.int64)
        return cls(shape, zero[:0].to(torch.uint8), counts, zero.expand(m), anchors)

    @classmethod
    def _of(cls, shape: tuple[int, int], columns: Tensor, counts: Tensor) -> SegmentedIndex:
        """With what follows from the counts."""
        if columns.numel() >= 2**31:
            raise ValueError(f"expected fewer than 2^31 entries in a matrix, got {columns.numel()}")
        ends = counts.sum(1, dtype=torch.int64).cumsum(0)
        return cls(shape, columns, counts, ends.to(torch.int32), _anchors_of(ends))

    @classmethod
    def from_parts(cls, shape: tuple[int, int], columns: Tensor, counts: Tensor) -> SegmentedIndex:
        """Rebuild an index from its stored tensors, which may come from anywhere.

        Raises:
            ValueError: they do not encode a sorted set of positions inside the matrix.
        """
        m, n = shape
        segments = -(-n // SEGMENT)
        if columns.dtype != torch.uint8 or columns.dim() != 1:
            raise ValueError(f"expected columns as 1-D uint8, got {_describe(columns)}")
        if counts.dtype != torch.uint8 or counts.shape != (m, segments):
            raise ValueError(f"expected counts as uint8 [{m}, {segments}], got {_describe(counts)}")
        total = int(counts.sum(dtype=torch.int64))
        if total != columns.numel():
            raise ValueError(f"counts say {total} entries, but there are {columns.numel()}")
        index = cls._of(shape, columns, counts)
        last_width = n - (segments - 1) * SEGMENT
        for start in range(0, m, DECODE_ROWS):
            stop = min(start + DECODE_ROWS, m)
            flat = index.decode(start, stop)
            first, last = index.span(start, stop)
            in_last = (flat - index.columns[first:last]) % n == (segments - 1) * SEGMENT
            limit = torch.where(in_last, last_width, SEGMENT)
            if bool((index.columns[first:last] >= limit).any()):
                raise ValueError("a column lies outside its segment")
            if bool((flat.diff() <= 0).any()):
                raise ValueError("the positions are not sorted or not distinct")
        return index

    @property
    def count(self) -> int:
        """k, the number of entries."""
        return self.columns.numel()

    @property
    def is_full(self) -> bool:
        """Whether it has every position."""
        return self.count == self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        parts = (self.columns, self.counts, self.ends, self.anchors)
        return sum(part.nbytes for part in parts)

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """The range of entries (first, last) that lie in rows `start:stop`.

        Known without a device synchronization where both are multiples of 64 or the last row.
        """
        return self._before(start), self._before(stop)

    def _before(self, row: int) -> int:
        if row >= self.shape[0]:
            return self.count
        if not self._anchors:
            return int(self.ends[row - 1]) - self.first if row else 0
        group, rest = divmod(row, ANCHOR_ROWS)
        before = self._anchors[group]
        if rest:
            before += int(self.counts[row - rest : row].sum(dtype=torch.int64))
        return before

    def part(self, start: int, stop: int) -> SegmentedIndex:
        """The entries of rows `start:stop` as they are stored; nothing is copied."""
        if start == 0 and stop == self.shape[0]:
            return self
        first, last = self.span(start, stop)
        return SegmentedIndex(
            (stop - start, self.shape[1]),
            self.columns[first:last],
            self.counts[start:stop],
            self.ends[start:stop],
            NO_ANCHORS,
            self.first + first,
        )

    @cached_property
    def _anchors(self) -> list[int]:
        """As Python reads them: a tensor's entry takes it ten times as long."""
        anchors: list[int] = self.anchors.tolist()
        return anchors

    @cached_property
    def strips(self) -> Strips:
        """Where the entries lie once columns are sorted; made when it is first asked for, and kept
        with the index."""
        return Strips.of(self.shape, self.columns.device, self._pieces)

    def _pieces(self) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, self.shape[0], DECODE_ROWS):
            yield start, self.decode(start, min(start + DECODE_ROWS, self.shape[0]))

    def decode(self, start: int, stop: int) -> Tensor:
        """Flat positions of the entries in rows `start:stop`, relative to row `start`: int64."""
        return self.part(start, stop).to_flat()

    def to_flat(self) -> Tensor:
        """All positions, flat (row * n + column): int64 [k].

        Temporary memory is O(entries + rows * segments); nothing is asked of the device.
        """
        (rows, segments), (m, n), device = self.counts.shape, self.shape, self.columns.device
        narrow = torch.int32 if m * n < 2**31 else torch.int64
        base = torch.arange(rows, dtype=narrow, device=device).mul_(n).unsqueeze(1) + (
            torch.arange(segments, dtype=narrow, device=device) * SEGMENT
        )
        counts = self.counts.reshape(-1).to(narrow)
        flat = torch.repeat_interleave(base.view(-1), counts, output_size=self.count)
        return flat.add_(self.columns).long()

    def map(self, fn: Callable[[Tensor], Tensor]) -> SegmentedIndex:
        """The same index with `fn` (a move to a device) applied to its device tensors."""
        return replace(self, columns=fn(self.columns), counts=fn(self.counts), ends=fn(self.ends))

    def to(self, device: torch.device) -> SegmentedIndex:
        """The same index on a device."""
        return self.map(lambda tensor: tensor.to(device))


def _anchors_of(ends: Tensor) -> Tensor:
    """Entries before every 64th row and in all, from int64 `ends` [m]: int64 on the CPU."""
    before = torch.zeros(ends.numel() + 1, dtype=torch.int64)
    before[1:] = ends
    return torch.cat([before[:-1:ANCHOR_ROWS], before[-1:]])


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def encoding_nbytes(count: int) -> int:
    """Bytes of tensors that `from_flat` takes beside the positions and what it makes of them."""
    return 6 * 8 * min(count, ENCODED_AT_ONCE)


def index_sizes(shape: tuple[int, int], count: int) -> list[int]:
    """Bytes of the tensors of a `SegmentedIndex` that are on its device: columns, counts, ends."""
    m, n = shape
    return [count, m * -(-n // SEGMENT), 4 * m]


def anchors_nbytes(rows: int) -> int:
    """Bytes of the anchors of so many rows, which are on the CPU."""
    return 8 * (-(-rows // ANCHOR_ROWS) + 1)


def index_nbytes(shape: tuple[int, int], count: int) -> int:
    """Bytes of a `SegmentedIndex`, from shapes alone."""
    return sum(index_sizes(shape, count)) + anchors_nbytes(shape[0])
