"""Adding stored offsets to a tile of dense rows."""

from __future__ import annotations

from torch import Tensor

from leanlift import ops
from leanlift.sparse.index import SegmentedIndex


def add_offsets_(
    rows: Tensor,
    index: SegmentedIndex,
    values: Tensor,
    start: int,
    stop: int,
    scale: float = 1.0,
) -> None:
    """Add `scale` times the offsets that lie in rows `start:stop` to `rows` [stop - start, n], in
    place; the product is formed in fp32 or wider."""
    ops.add_offsets_(rows, offsets_of(index, values, start, stop, scale))


def offsets_of(
    index: SegmentedIndex, values: Tensor, start: int, stop: int, scale: float = 1.0
) -> ops.Offsets:
    """The offsets of rows `start:stop` as they are stored, out of all `values` [k]."""
    if start == 0 and stop == index.shape[0]:
        return ops.Offsets(index.whole, values, scale)
    first, last = index.span(start, stop)
    return ops.Offsets(index.part(start, stop), values[first:last], scale)
