"""The best rank-R approximation of a matrix that is seen only through row tiles.

Eckart-Young: the best rank-R approximation of W is W V V^T, with V the R leading right singular
vectors. So a rank-R approximation is held as two thin factors, `left` = W V [m, R] and
`right` = V [n, R], and its rows are `left[rows] @ right^T`.

Two routes find V: `gram`, for a small side, and `krylov`, otherwise. Both compute in blocks of 256
rows, however large the tiles are in which the matrix is read, so the factors do not depend on the
tile size, bit for bit.

Shapes: m rows, n columns, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

MIN_GAP = 1e-4
"""Relative distance of the singular values R and R + 1 below which they count as equal."""

RESOLUTION_GRAM, RESOLUTION_KRYLOV = 3e-6, 1e-4
"""Shares of the largest score below which a score may be noise: of the fp64 squares of the Gram
matrix, and of the fp32 products of the iteration. Masks that reach further down were seen to differ
from the exact ones (tests, "spikes")."""


@dataclass(frozen=True)
class LowRank:
    """W' = left @ right^T, with how it was found.

    Attributes:
        converged: the mask had stopped moving, and singular value R + 1 is smaller than R; else
            the approximation, and so the mask, is one of many equally good ones.
        steps: sweeps over the matrix.
        resolution: as a share of the largest score, what a score must exceed to be more than noise.
    """

    left: Tensor
    right: Tensor
    converged: bool
    steps: int
    resolution: float

    def scores(self, start: int, stop: int) -> Tensor:
        """|W'| of rows start:stop: fp32 [stop - start, n]."""
        return (self.left[start:stop] @ self.right.T).abs_()


def has_gap(squares: Tensor, rank: int) -> bool:
    """Whether singular value R + 1 is smaller than R, given descending squared values.

    Behind an exact lower rank there is nothing left to choose from, which is as good as a gap.
    """
    sigma = squares.clamp_min(0).sqrt()
    if sigma.numel() <= rank:
        return True
    return bool(sigma[rank] <= max((1 - MIN_GAP) * sigma[rank - 1], MIN_GAP * sigma[0]))
