"""Adding stored offsets to a tile of dense rows."""

from __future__ import annotations

import torch
from torch import Tensor

from leanlift.ops import patch_rows_
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
    first, last = index.span(start, stop)
    if first < last:
        offsets = values[first:last]
        if scale != 1:
            offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32)) * scale
        patch_rows_(rows, index.decode(start, stop), offsets)
