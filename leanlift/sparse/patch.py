"""Adding stored offsets to a tile of dense rows."""

from __future__ import annotations

from torch import Tensor

from leanlift.ops import patch_rows_
from leanlift.sparse.index import SegmentedIndex


def add_offsets_(
    rows: Tensor, index: SegmentedIndex, values: Tensor, start: int, stop: int
) -> None:
    """Add the offsets that lie in rows `start:stop` to `rows` [stop - start, n], in place."""
    first, last = index.span(start, stop)
    if first < last:
        patch_rows_(rows, index.decode(start, stop), values[first:last])
