"""RowTiles: the one way in which leanlift looks at a matrix.

Selection, the patched layer and the merge never ask for a whole matrix. They ask for rows. A
quantized weight, a dense tensor, a tensor inside a safetensors file and the effective weight
(base + offsets) all answer that question, so none of the askers knows bitsandbytes, and most
tests run on plain dense tensors.

Shapes: a matrix is m x n (out_features x in_features), row-major; a tile is `rows x n`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

TILE_ROW_MULTIPLE = 64
"""Tiles start at multiples of this many rows, which is what the compact index is anchored at."""

DEFAULT_TILE_BYTES = 32 * 2**20


@runtime_checkable
class RowTiles(Protocol):
    """A matrix that can be read by rows.

    `rows(start, stop)` returns rows `start:stop` as a `[stop - start, n]` tensor of `dtype` that
    the caller must not write to. Any row range equals the slice of the whole bit for bit.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows that are read."""

    @property
    def device(self) -> torch.device:
        """Where they are."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start:stop`, [stop - start, n]."""


@dataclass(frozen=True)
class DenseTiles:
    """A plain 2-D tensor seen as RowTiles; `rows` returns views."""

    tensor: Tensor

    def __post_init__(self) -> None:
        if self.tensor.dim() != 2:
            raise ValueError(f"expected a 2-D tensor, got shape {tuple(self.tensor.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self.tensor.shape
        return m, n

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def rows(self, start: int, stop: int) -> Tensor:
        return self.tensor[start:stop]


@dataclass(frozen=True)
class _Derived:
    """A matrix whose rows are made from another one's."""

    source: RowTiles

    @property
    def shape(self) -> tuple[int, int]:
        return self.source.shape

    @property
    def device(self) -> torch.device:
        return self.source.device


@dataclass(frozen=True)
class CastTiles(_Derived):
    """A matrix read in another dtype."""

    dtype: torch.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        return self.source.rows(start, stop).to(self.dtype)


@dataclass(frozen=True)
class ScaledTiles(_Derived):
    """A matrix times a power of two, in fp32."""

    exponent: int
    dtype: torch.dtype = torch.float32

    def rows(self, start: int, stop: int) -> Tensor:
        return torch.ldexp(
            self.source.rows(start, stop).float(), torch.tensor(self.exponent, device=self.device)
        )


class StackedTiles(RowTiles, Protocol):
    """Matrices of one shape, the rows of each after those of the one before: of E experts [m, n]
    one matrix [E * m, n]."""

    @property
    def parts(self) -> int:
        """E, how many there are."""


@dataclass(frozen=True)
class StackTiles(DenseTiles):
    """A plain tensor [E, m, n] seen as StackedTiles."""

    parts: int

    @classmethod
    def of(cls, tensor: Tensor) -> StackTiles:
        """The matrices of a contiguous 3-D tensor; nothing is copied."""
        if tensor.dim() != 3:
            raise ValueError(f"expected a 3-D tensor, got shape {tuple(tensor.shape)}")
        return cls(tensor.flatten(0, 1), tensor.shape[0])


def is_stack(tiles: RowTiles) -> bool:
    """Whether these are StackedTiles."""
    return hasattr(tiles, "parts")


def parts_of(tiles: RowTiles) -> int:
    """How many matrices a matrix is a stack of; one is a stack of itself."""
    parts: int = getattr(tiles, "parts", 1)
    return parts


def parts_of_stacks(matrices: Mapping[str, RowTiles], names: Iterable[str]) -> dict[str, int]:
    """How many matrices each of those named is a stack of, without those that are none."""
    return {name: parts_of(matrices[name]) for name in names if is_stack(matrices[name])}


def part_shape(tiles: RowTiles) -> tuple[int, int]:
    """(m, n) of each matrix of a stack."""
    rows, n = tiles.shape
    return rows // parts_of(tiles), n


@dataclass(frozen=True)
class RangeTiles(_Derived):
    """Rows `start:stop` of a matrix, seen as one."""

    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.stop - self.start, self.source.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        return self.source.rows(self.start + start, self.start + stop)


def makes_new_rows(tiles: RowTiles) -> bool:
    """Whether rows are new tensors at every call, which the caller may write to after all: a
    matrix that has them so says `fresh = True`. Asked when a layer is made."""
    return bool(getattr(tiles, "fresh", False))


def as_tiles(matrix: RowTiles | Tensor) -> RowTiles:
    """`matrix` itself, or a 2-D tensor wrapped as `DenseTiles`."""
    return DenseTiles(matrix) if isinstance(matrix, Tensor) else matrix


def tile_rows(n: int, itemsize: int, tile_bytes: int = DEFAULT_TILE_BYTES) -> int:
    """How many rows of n entries of `itemsize` bytes make one tile of about `tile_bytes`.

    Always a positive multiple of `TILE_ROW_MULTIPLE`.
    """
    rows = tile_bytes // max(1, n * itemsize)
    return max(TILE_ROW_MULTIPLE, rows // TILE_ROW_MULTIPLE * TILE_ROW_MULTIPLE)


def row_ranges(m: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) row ranges of at most `step` rows that cover 0..m."""
    for start in range(0, m, step):
        yield start, min(start + step, m)


def few_of(ranges: Iterable[tuple[int, int]], x: Tensor) -> list[tuple[int, int]]:
    """The pieces to go over: all; of a plan's x, which has no numbers, the first two and the last,
    as those between take what the second takes."""
    every = [*ranges]
    return [*every[:2], every[-1]] if isinstance(x, FakeTensor) and len(every) > 3 else every
