"""What the operations work on beside rows and offsets: plain tensors with names.

A kernel reads a weight as it is stored and positions as the compact index holds them, so neither
is ever spread out in memory. Nothing here knows bitsandbytes or a module.

Shapes: m x n the matrix, r rows of a tile, S segments a row, k entries of the tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from leanlift.sparse import Offsets, SegmentedIndex
from leanlift.tiles import RowTiles


@dataclass(frozen=True)
class Scales:
    """Scales that are quantized themselves: table[code] * absmax[block] + offset.

    Attributes:
        absmax: fp32, one per `blocksize` codes.
        table: fp32 [256].
        offset: fp32 scalar.
        blocksize: codes per absmax.
    """

    absmax: Tensor
    table: Tensor
    offset: Tensor
    blocksize: int


@dataclass(frozen=True)
class FourBit:
    """A 4-bit matrix: table[code] * absmax[block], rounded to the weight's dtype.

    Attributes:
        packed: uint8 [ceil(m n / 2)], the row-major flattened matrix, the first of two codes in
            the high half.
        absmax: one scale per `blocksize` entries: fp32, or uint8 codes where `nested` is given.
        table: fp32 [16].
        blocksize: entries per scale, a power of two.
        nested: how the scales are quantized.
    """

    packed: Tensor
    absmax: Tensor
    table: Tensor
    blocksize: int
    nested: Scales | None


@dataclass(frozen=True)
class EightBit:
    """An INT8 matrix: codes int8 [m, n] * scales fp32 [m] / 127."""

    codes: Tensor
    scales: Tensor


@dataclass(frozen=True)
class MomentParts:
    """Both moments of Adam as they are kept: fp32 [k], or uint8 codes [k] with fp32 scales
    [ceil(k / 256)] and ascending tables fp32 [256]."""

    first: Tensor
    second: Tensor
    first_absmax: Tensor | None = None
    second_absmax: Tensor | None = None
    first_table: Tensor | None = None
    second_table: Tensor | None = None


Take = Callable[[int, int, torch.dtype, torch.device], Tensor]
"""Lends an uninitialized contiguous [rows, columns] of a dtype on a device."""


class TileOps(Protocol):
    """One implementation of what joins a sparse store to dense rows.

    Attributes:
        name: one of `IMPLEMENTATIONS`.
        whole: whether `effective_rows` needs no memory that grows with the tile, so that a matrix
            is written in one go.
        lists_rows: whether `sampled_product` keeps lists of all rows with an index, so that it is
            asked for all of them at once.
    """

    name: str
    whole: bool
    lists_rows: bool

    def effective_rows(
        self, weight: RowTiles, offsets: Sequence[Offsets], start: int, stop: int, out: Tensor
    ) -> None:
        """Write rows `start:stop` of D(Q) + offsets to contiguous `out` [stop - start, n].

        A weight that a kernel can dequantize itself also has `stored() -> FourBit | EightBit`.
        D(Q) is taken in the weight's dtype, the sum is formed in fp32 or wider and rounded once.
        Positions of several stores are disjoint.
        """
        ...

    def gather(self, dense: Tensor, index: SegmentedIndex, out: Tensor) -> None:
        """Write the entries `index` of contiguous `dense` [r, n] to `out` [k], in out's dtype."""
        ...

    def sampled_product(
        self, left: Tensor, right: Tensor, index: SegmentedIndex, out: Tensor, take: Take
    ) -> None:
        """Write the entries `index` of left^T [r, T] @ right [T, n] to contiguous `out` [k].

        Args:
            left, right: [T, r] and [T, n], of one dtype, in which the product may be formed; sums
                are in fp32 or wider.
            index: which entries.
            out: of any floating dtype; overwritten.
            take: lends room for a dense [r, n] to implementations that form one.
        """
        ...
