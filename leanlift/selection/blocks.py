"""Reading a matrix in tiles, computing on it in blocks.

How much is read at once is a matter of memory, and configurable. What is computed at once decides
the order of floating-point sums. Keeping the two apart makes a mask independent of the tile size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from leanlift.tiles import RowTiles, row_ranges

BLOCK_ROWS = 256


def block_rows(m: int) -> int:
    """Rows of the blocks over which sums are formed, of a matrix with m rows."""
    return min(m, BLOCK_ROWS)


def read_blocks(
    tiles: RowTiles, tile_bytes: int, dtype: torch.dtype, end: int | None = None
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (start, stop, rows start:stop in `dtype`) over rows 0..end, 256 at a time.

    The rows are read in tiles of about `tile_bytes` in the matrix's own dtype, at least one
    block; the caller must not write to what it gets.
    """
    m, n = tiles.shape
    per_tile = tile_bytes // (n * tiles.dtype.itemsize) // BLOCK_ROWS * BLOCK_ROWS
    for start, stop in row_ranges(m if end is None else end, max(BLOCK_ROWS, per_tile)):
        tile = tiles.rows(start, stop)
        for a, b in row_ranges(stop - start, BLOCK_ROWS):
            yield start + a, start + b, tile[a:b].to(dtype)
        del tile  # before the next one is read


def tile_nbytes(shape: tuple[int, int], itemsize: int, tile_bytes: int) -> int:
    """Bytes of the largest tile that `read_blocks` asks for."""
    m, n = shape
    per_tile = tile_bytes // (n * itemsize) // BLOCK_ROWS * BLOCK_ROWS
    return min(m, max(BLOCK_ROWS, per_tile)) * n * itemsize
