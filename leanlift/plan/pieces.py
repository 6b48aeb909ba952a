"""Operations that go over a matrix piece by piece, run over the first pieces alone.

Under fake tensors a piece costs the host as much as a real one, and the device nothing: of a plan's
time most would go into pieces that are like those before them. A piece's memory is what one piece
takes beside the remains of the one before, so the first two, and what all of them write to, show
the peak; a test holds it against that of all pieces, to the byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from leanlift.layers import TILE_BYTES, Workspace
from leanlift.layers.lm_head import TILE_BYTES as HEAD_TILE_BYTES
from leanlift.layers.lm_head import Head
from leanlift.ops.parts import Take
from leanlift.ops.reference import TorchOps
from leanlift.ops.sampled import TOKENS
from leanlift.sparse import Offsets, SegmentedIndex
from leanlift.tiles import RowTiles, tile_rows

PIECES = 2


class FirstPieces(TorchOps):
    """The reference, over the first two pieces of whatever is done in pieces.

    Args:
        whole: whether effective weights are asked for in one call, whose pieces are made here, as
            the layer makes them.
    """

    def __init__(self, whole: bool) -> None:
        self.whole = whole

    def effective_rows(
        self, weight: RowTiles, offsets: Sequence[Offsets], start: int, stop: int, out: Tensor
    ) -> None:
        rows, n = out.shape
        step = tile_rows(n, 4, TILE_BYTES) if self.whole else rows
        for first in range(0, min(rows, PIECES * step), step):
            last = min(first + step, rows)
            parts = [store.rows(first, last) for store in offsets]
            super().effective_rows(weight, parts, start + first, start + last, out[first:last])

    def sampled_product(
        self, left: Tensor, right: Tensor, index: SegmentedIndex, out: Tensor, take: Take
    ) -> None:
        tokens = PIECES * TOKENS
        super().sampled_product(left[:tokens], right[:tokens], index, out, take)


def first_tiles(head: Head, tokens: int, width: int) -> Head:
    """A head with the vocabulary of the first tiles that the loss goes over, and no fewer entries
    than make it go over tiles at all.

    Args:
        head: of the model.
        tokens: that the loss is over.
        width: of a hidden state.
    """
    step = max(64, HEAD_TILE_BYTES // (4 * max(tokens, width, 1)))
    rows = max(PIECES * step, HEAD_TILE_BYTES // (4 * max(1, tokens)) + 1)
    if rows >= head.weight.shape[0]:
        return head
    bias = None if head.bias is None else head.bias[:rows]
    return replace(head, weight=_FirstRows(head.weight, rows), bias=bias)


@dataclass(frozen=True)
class _FirstRows:
    """The first rows of a matrix, as RowTiles."""

    source: RowTiles
    count: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.count, self.source.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def device(self) -> torch.device:
        return self.source.device

    def rows(self, start: int, stop: int) -> Tensor:
        return self.source.rows(start, stop)


def first_pieces(always: bool) -> Workspace:
    """A workspace whose layers go over first pieces; `always`: in the scratch."""
    return Workspace(FirstPieces(whole=always), always)
