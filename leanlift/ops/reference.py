"""The operations that join a sparse store to dense rows, in plain torch: the specification.

All take positions relative to the tile they act on, so a tile never needs the whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from leanlift.ops.parts import Take
from leanlift.ops.sampled import SAMPLED_DENSITY, sampled_product_
from leanlift.sparse import Offsets, SegmentedIndex, add_offsets_
from leanlift.tiles import RowTiles


def dense_product(
    gather: Callable[[Tensor, SegmentedIndex, Tensor], None],
    left: Tensor,
    right: Tensor,
    index: SegmentedIndex,
    out: Tensor,
    take: Take,
) -> None:
    """`TileOps.sampled_product` by way of all entries of the product, in the dtype of `left`."""
    if index.count:
        dense = take(left.shape[1], right.shape[1], left.dtype, left.device)
        torch.mm(left.T, right, out=dense)
        gather(dense, index, out)


def gather_entries(rows: Tensor, flat: Tensor, out: Tensor) -> None:
    """Write the entries `flat` of contiguous `rows` [r, n] to `out` [k], in out's dtype."""
    out.copy_(rows.view(-1).index_select(0, flat))


class TorchOps:
    """The reference as an implementation; see `TileOps`."""

    name = "torch"
    whole = False
    lists_rows = False

    def effective_rows(
        self, weight: RowTiles, offsets: Sequence[Offsets], start: int, stop: int, out: Tensor
    ) -> None:
        rows = weight.rows(start, stop)
        if out.dtype in (weight.dtype, torch.float32, torch.float64):
            out.copy_(rows)
            for store in offsets:
                add_offsets_(out, store)
        else:  # add before rounding, so that an entry is rounded once
            wide = rows.to(torch.float32, copy=True)
            for store in offsets:
                add_offsets_(wide, store)
            out.copy_(wide)

    def gather(self, dense: Tensor, index: SegmentedIndex, out: Tensor) -> None:
        gather_entries(dense, index.to_flat(), out)

    def sampled_product(
        self, left: Tensor, right: Tensor, index: SegmentedIndex, out: Tensor, take: Take
    ) -> None:
        few = index.count <= SAMPLED_DENSITY * index.shape[0] * index.shape[1]
        if few and left.device.type == "cpu":
            sampled_product_(left, right, index, out)
        else:
            dense_product(self.gather, left, right, index, out, take)
