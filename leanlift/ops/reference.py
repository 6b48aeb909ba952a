"""The operations that join a sparse store to dense rows, in plain torch: the specification.

All take positions relative to the tile they act on, so a tile never needs the whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from leanlift.ops.parts import IndexPart, Offsets, Source, Take
from leanlift.ops.sampled import SAMPLED_DENSITY, sampled_product_


def decode(part: IndexPart) -> Tensor:
    """Flat positions (row * n + column) of the entries, relative to the tile: int64 [k].

    Temporary memory is O(entries + rows * segments); nothing is asked of the device.
    """
    (rows, segments), device = part.counts.shape, part.columns.device
    narrow = torch.int32 if rows * part.width < 2**31 else torch.int64
    base = torch.arange(rows, dtype=narrow, device=device).mul_(part.width).unsqueeze(1) + (
        torch.arange(segments, dtype=narrow, device=device) * part.segment
    )
    counts = part.counts.reshape(-1).to(narrow)
    flat = torch.repeat_interleave(base.view(-1), counts, output_size=part.columns.numel())
    return flat.add_(part.columns).long()


def patch_rows_(rows: Tensor, flat: Tensor, values: Tensor) -> None:
    """Add `values` to the entries `flat` of contiguous `rows`, in place.

    The sum is formed in fp32 (or in fp64, where either side is) and rounded once to the dtype of
    `rows`.

    Args:
        rows: [r, n] floating, contiguous.
        flat: int64 [k], distinct positions in 0..r*n-1.
        values: [k] floating.
    """
    entries = rows.view(-1)
    if rows.dtype == values.dtype and rows.dtype in (torch.float32, torch.float64):
        entries.index_add_(0, flat, values)  # positions are distinct: the same sums in one pass
        return
    wide = torch.float64 if torch.float64 in (rows.dtype, values.dtype) else torch.float32
    # index_select and index_copy_ take half the time of indexing on a CPU
    patched = entries.index_select(0, flat).to(wide) + values.to(wide)
    entries.index_copy_(0, flat, patched.to(rows.dtype))


def add_offsets_(rows: Tensor, offsets: Offsets) -> None:
    """Add the offsets to contiguous `rows` [r, n], in place; the product with their scale is
    formed in fp32 or wider."""
    if offsets.part.columns.numel():
        values = offsets.values
        if offsets.scale != 1:
            values = values.to(torch.promote_types(values.dtype, torch.float32)) * offsets.scale
        patch_rows_(rows, decode(offsets.part), values)


def dense_product(
    gather: Callable[[Tensor, IndexPart, Tensor], None],
    left: Tensor,
    right: Tensor,
    part: IndexPart,
    out: Tensor,
    take: Take,
) -> None:
    """`TileOps.sampled_product` by way of all entries of the product, in the dtype of `left`."""
    if part.columns.numel():
        dense = take(left.shape[1], right.shape[1], left.dtype, left.device)
        torch.mm(left.T, right, out=dense)
        gather(dense, part, out)


def gather_entries(rows: Tensor, flat: Tensor, out: Tensor) -> None:
    """Write the entries `flat` of contiguous `rows` [r, n] to `out` [k], in out's dtype."""
    out.copy_(rows.view(-1).index_select(0, flat))


class TorchOps:
    """The reference as an implementation; see `TileOps`."""

    name = "torch"
    whole = False

    def effective_rows(
        self, weight: Source, offsets: Sequence[Offsets], start: int, stop: int, out: Tensor
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

    def gather(self, dense: Tensor, part: IndexPart, out: Tensor) -> None:
        gather_entries(dense, decode(part), out)

    def sampled_product(
        self, left: Tensor, right: Tensor, part: IndexPart, out: Tensor, take: Take
    ) -> None:
        few = part.columns.numel() <= SAMPLED_DENSITY * part.counts.shape[0] * part.width
        if few and left.device.type == "cpu":
            sampled_product_(left, right, part, out)
        else:
            dense_product(self.gather, left, right, part, out, take)
