"""The best rank-R approximation from the eigenvectors of W^T W or W W^T, formed in fp64.

Direct, and exact up to rounding; for a small side.
"""

from __future__ import annotations

import torch

from leanlift.selection.blocks import block_rows, read_blocks
from leanlift.selection.lowrank import RESOLUTION_GRAM, LowRank, has_gap
from leanlift.tiles import RowTiles


def gram_factors(tiles: RowTiles, rank: int, tile_bytes: int) -> LowRank:
    """Rank-R factors from the Gram matrix of the smaller side, in fp64.

    Never the whole of W: see `gram_nbytes`.
    """
    m, n = tiles.shape
    if n <= m:
        gram = torch.zeros(n, n, dtype=torch.float64, device=tiles.device)
        for _, _, rows in read_blocks(tiles, tile_bytes, torch.float64):
            gram.addmm_(rows.T, rows)
        squares, vectors = torch.linalg.eigh(gram)
        right = vectors[:, -rank:].clone()
        left = torch.empty(m, rank, device=tiles.device)
        for start, stop, rows in read_blocks(tiles, tile_bytes, torch.float64):
            left[start:stop] = rows @ right
        return LowRank(left, right.float(), has_gap(squares.flip(0), rank), 1, RESOLUTION_GRAM)
    gram = torch.empty(m, m, dtype=torch.float64, device=tiles.device)
    for start, stop, rows in read_blocks(tiles, tile_bytes, torch.float64):
        for other_start, other_stop, others in read_blocks(tiles, tile_bytes, torch.float64, stop):
            product = rows @ others.T
            gram[start:stop, other_start:other_stop] = product
            gram[other_start:other_stop, start:stop] = product.T
    squares, vectors = torch.linalg.eigh(gram)
    left = vectors[:, -rank:].clone()
    # W' = U U^T W: the left factor is U, the right one W^T U.
    wide = torch.zeros(n, rank, dtype=torch.float64, device=tiles.device)
    for start, stop, rows in read_blocks(tiles, tile_bytes, torch.float64):
        wide.addmm_(rows.T, left[start:stop])
    return LowRank(left.float(), wide.float(), has_gap(squares.flip(0), rank), 1, RESOLUTION_GRAM)


def gram_nbytes(shape: tuple[int, int], rank: int) -> int:
    """Peak bytes of `gram_factors` beyond its tiles: the matrix, its eigenvectors, the solver's
    workspace and the factors, plus two fp64 blocks of rows."""
    m, n = shape
    side = min(m, n)
    return 8 * (4 * side * side + 2 * block_rows(m) * n + 2 * (m + n) * rank)
