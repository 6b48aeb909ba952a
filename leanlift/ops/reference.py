"""The two operations that join a sparse store to dense rows, in plain torch.

Both take positions relative to the tile they act on, so a tile never needs the whole matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    wide = torch.float64 if torch.float64 in (rows.dtype, values.dtype) else torch.float32
    entries[flat] = (entries[flat].to(wide) + values.to(wide)).to(rows.dtype)


def gather_entries(rows: Tensor, flat: Tensor, out: Tensor) -> None:
    """Write the entries `flat` of contiguous `rows` [r, n] to `out` [k], in out's dtype."""
    out.copy_(rows.view(-1)[flat])
