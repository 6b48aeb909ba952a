"""Chosen entries of a product by way of the rows and strips of columns that hold any, in plain
torch: what `leanlift.ops.triton_strips` computes.

A row-tiled product forms all m x n entries of the gradient; a 5 % mask of principal entries has
none in a good part of them (`leanlift.sparse.strips`).

Shapes: T tokens, m rows, n columns, k entries; N the columns of all strips, n rounded up to a
multiple of 128.
"""

from __future__ import annotations

from torch import Tensor

from leanlift.ops.parts import Take
from leanlift.sparse import STRIP, SegmentedIndex


def strips_product(
    left: Tensor, right: Tensor, index: SegmentedIndex, out: Tensor, take: Take
) -> None:
    """`TileOps.sampled_product` by way of listed rows, rounded to the dtype of `left` on the way.

    Temporary memory beside what `take` lends, [m, N]: both factors, with rows and columns as they
    are multiplied.
    """
    if not index.count:
        return
    strips = index.strips
    dense = take(index.shape[0], strips.width, left.dtype, left.device)
    turned, sorted_ = left.T.contiguous(), right.index_select(1, strips.order)
    for group, strip in zip(strips.rows, strips.strips.tolist(), strict=True):
        rows = group[group >= 0].long()
        own = slice(strip * STRIP, (strip + 1) * STRIP)
        dense[rows, own] = turned.index_select(0, rows) @ sorted_[:, own]
    out.copy_(dense.view(-1).index_select(0, _places(index)))


def _places(index: SegmentedIndex) -> Tensor:
    """Where each entry is in [m, N] with sorted columns: int64 [k]."""
    flat, n = index.to_flat(), index.shape[1]
    row = flat // n
    return row * index.strips.width + index.strips.ranks[flat - row * n]
