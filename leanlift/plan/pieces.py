"""Operations that go over a matrix piece by piece, run over the first pieces alone.

Under fake tensors a piece costs the host as much as a real one, and the device nothing: of a plan's
time most would go into pieces that are like those before them. A piece's memory is what one piece
takes beside the remains of the one before, so the first two, and what all of them write to, show
the peak; a test holds it against that of all pieces, to the byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from leanlift.layers import FrozenLinear, Workspace, patched_rows
from leanlift.layers.lm_head import Head, kept_columns, tile_columns
from leanlift.layers.workspace import Scratch
from leanlift.ops.parts import Take
from leanlift.ops.reference import TorchOps
from leanlift.ops.sampled import TOKENS
from leanlift.sparse import Offsets, SegmentedIndex
from leanlift.tiles import RowTiles

PIECES = 2


class FirstPieces(TorchOps):
    """The reference, over the first two pieces of whatever is done in pieces."""

    def effective_rows(
        self, weight: RowTiles, offsets: Sequence[Offsets], start: int, stop: int, out: Tensor
    ) -> None:
        if start < PIECES * patched_rows(out.shape[1]):
            super().effective_rows(weight, offsets, start, stop, out)

    def sampled_product(
        self, left: Tensor, right: Tensor, index: SegmentedIndex, out: Tensor, take: Take
    ) -> None:
        tokens = PIECES * TOKENS
        super().sampled_product(left[:tokens], right[:tokens], index, out, take)


class NoPieces(TorchOps):
    """No piece at all: for a pass of which nothing but shapes and operations is wanted."""

    whole = True

    def effective_rows(
        self, weight: RowTiles, offsets: Sequence[Offsets], start: int, stop: int, out: Tensor
    ) -> None:
        pass


@contextmanager
def no_pieces(model: nn.Module) -> Iterator[None]:
    """The layers of ours in a model make no weights; the scratch stays as it is."""
    spaces = {m.workspace for m in model.modules() if isinstance(m, FrozenLinear)}
    before = [(space, space.ops, space.scratch) for space in spaces]
    try:
        for space in spaces:
            space.ops, space.scratch = NoPieces(), Scratch()
        yield
    finally:
        for space, ops, scratch in before:
            space.ops, space.scratch = ops, scratch


def first_tiles(head: Head, hidden: Tensor) -> Head:
    """A head with the vocabulary of the first tiles that the loss goes over, and no fewer entries
    than make it go over tiles at all.

    Args:
        head: of the model.
        hidden: the states [T, d] that the loss is over.
    """
    kept = kept_columns(hidden.shape[0], hidden.dtype.itemsize)
    rows = max(PIECES * tile_columns(*hidden.shape), kept + 1)
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


def first_pieces(device_type: str) -> Workspace:
    """A workspace whose layers go over first pieces, as on a device of this kind."""
    return Workspace(FirstPieces(), device_type)
