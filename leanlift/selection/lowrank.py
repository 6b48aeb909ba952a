"""The best rank-R approximation of a matrix that is seen only through row tiles.

Eckart-Young: the best rank-R approximation of W is W V V^T, with V the R leading right singular
vectors. So a rank-R approximation is held as two thin factors, `left` = W V [m, R] and
`right` = V [n, R], and its rows are `left[rows] @ right^T`.

Two routes find V:

* `gram_factors`, for a small side: eigenvectors of W^T W or W W^T, formed in fp64. Direct, and
  exact up to rounding.
* `krylov_factors`, otherwise: a block Krylov iteration with Rayleigh-Ritz projection (Musco &
  Musco, arXiv 1504.05477), two thin products with each tile per step, one sweep over the tiles
  per step. A fixed number of steps does not give the right mask, so the iteration goes on until
  the mask itself has stopped moving: the top entries of a fixed sample of rows are compared from
  step to step.

Shapes: m rows, n columns, R rank, w block width (R + oversampling), d steps in a cycle.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leanlift.tiles import RowTiles, row_ranges

OVERSAMPLING = 8
CYCLE = 5
"""Blocks held before the subspace is cut back to its best w directions (a thick restart)."""

SAMPLE_ENTRIES = 2**20
MIN_GAP = 1e-4
"""Relative distance of the singular values R and R + 1 below which they count as equal."""


@dataclass(frozen=True)
class LowRank:
    """W' = left @ right^T, with how it was found."""

    left: Tensor
    right: Tensor
    converged: bool
    steps: int

    def scores(self, start: int, stop: int) -> Tensor:
        """|W'| of rows start:stop: fp32 [stop - start, n]."""
        return (self.left[start:stop] @ self.right.T).abs_()


def gram_factors(tiles: RowTiles, rank: int, step: int) -> LowRank:
    """Rank-R factors from the Gram matrix of the smaller side, in fp64.

    Memory: three fp64 squares of the smaller side (the matrix and the eigensolver) and two fp64
    tiles; never the whole of W.
    """
    m, n = tiles.shape
    ranges = list(row_ranges(m, step))
    if n <= m:
        gram = torch.zeros(n, n, dtype=torch.float64, device=tiles.device)
        for start, stop in ranges:
            rows = tiles.rows(start, stop).double()
            gram.addmm_(rows.T, rows)
        squares, vectors = torch.linalg.eigh(gram)
        right = vectors[:, -rank:]
        left = torch.cat([tiles.rows(a, b).double() @ right for a, b in ranges])
        return LowRank(left.float(), right.float(), _has_gap(squares.flip(0), rank), steps=1)
    gram = torch.empty(m, m, dtype=torch.float64, device=tiles.device)
    for i, (start, stop) in enumerate(ranges):
        rows = tiles.rows(start, stop).double()
        for other_start, other_stop in ranges[: i + 1]:
            product = rows @ tiles.rows(other_start, other_stop).double().T
            gram[start:stop, other_start:other_stop] = product
            gram[other_start:other_stop, start:stop] = product.T
    squares, vectors = torch.linalg.eigh(gram)
    left = vectors[:, -rank:]
    # W' = U U^T W: the left factor is U, the right one W^T U.
    right = torch.zeros(n, rank, dtype=torch.float64, device=tiles.device)
    for start, stop in ranges:
        right.addmm_(tiles.rows(start, stop).double().T, left[start:stop])
    return LowRank(left.float(), right.float(), _has_gap(squares.flip(0), rank), steps=1)


def krylov_factors(
    tiles: RowTiles, rank: int, count: int, step: int, tolerance: float, max_steps: int, seed: int
) -> LowRank:
    """Rank-R factors from a restarted block Krylov iteration that stops when the mask is still.

    Args:
        tiles: the matrix.
        rank: R, at most min(m, n).
        count: entries of the mask; decides what has to converge.
        step: rows per tile.
        tolerance: the largest share of the sampled mask that may still change from one step to
            the next. The iteration converges faster than geometrically, so the mask of the last
            step is closer to the limit than that.
        max_steps: gives up after so many sweeps; the result then says `converged=False`.
        seed: of the random start.

    Memory: (m + n) * w * CYCLE fp32 values and one fp32 tile.
    """
    m, n = tiles.shape
    width = min(rank + OVERSAMPLING, m, n)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(n, width, generator=generator).to(tiles.device)
    block = torch.linalg.qr(start).Q
    basis: list[Tensor] = []  # right blocks, [n, w] each, orthonormal together
    images: list[Tensor] = []  # W @ basis, [m, w] each
    sample = _sample_rows(m, n, tiles.device)
    sampled_count = max(1, round(count * sample.numel() / m))
    # With few entries in the sample "unchanged" comes by chance: ask for it twice.
    needed, quiet = (1 if tolerance * sampled_count >= 1 else 2), 0
    previous: Tensor | None = None
    factors: tuple[Tensor, Tensor] | None = None
    for steps in range(1, max_steps + 1):
        image, following = _sweep(tiles, block, step)
        basis.append(block)
        images.append(image)
        left, right, ritz, unique = _rayleigh_ritz(basis, images, rank, width)
        factors = (left, right)
        mask = _top_mask(left[sample] @ right.T, sampled_count)
        if previous is not None:
            changed = 1.0 - float((mask & previous).sum()) / sampled_count
            quiet = quiet + 1 if changed <= tolerance else 0
            if quiet >= needed:
                return LowRank(left, right, converged=unique, steps=steps)
        previous = mask
        # What W^T W adds to the subspace, before the subspace is cut back: the part of it that a
        # restart discards must not come in again.
        block = _orthonormal_against(following, basis)
        if block is None:
            return LowRank(left, right, converged=unique, steps=steps)
        if len(basis) >= CYCLE or (len(basis) + 1) * width > min(m, n):
            basis, images = [ritz[0]], [ritz[1]]
            block = _orthonormal_against(block, basis)  # noise, where the space was nearly full
            assert block is not None
    assert factors is not None
    return LowRank(*factors, converged=False, steps=max_steps)


def _sweep(tiles: RowTiles, block: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """W @ block and W^T @ (W @ block) in one pass over the tiles."""
    m, _ = tiles.shape
    image = torch.empty(m, block.shape[1], device=block.device)
    back = torch.zeros_like(block)
    for start, stop in row_ranges(m, step):
        rows = tiles.rows(start, stop).float()
        torch.mm(rows, block, out=image[start:stop])
        back.addmm_(rows.T, image[start:stop])
    return image, back


def _rayleigh_ritz(
    basis: list[Tensor], images: list[Tensor], rank: int, width: int
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], bool]:
    """Best rank-R approximation of W restricted to the span of `basis`.

    Returns left [m, R]; right [n, R]; (right, left) for the best `width` directions; and whether
    there is a gap behind the R-th singular value, without which the answer is not unique.
    """
    image = torch.cat(images, dim=1)
    span = torch.cat(basis, dim=1)
    # Rotations by eigenvectors of the small fp64 Gram matrix: an SVD may fail on repeated values.
    small = image.double()
    squares, turn = torch.linalg.eigh(small.T @ small)
    squares, turn = squares.flip(0), turn.flip(1)[:, :width].float()
    right, left = span @ turn, image @ turn
    return left[:, :rank], right[:, :rank], (right, left), _has_gap(squares, rank)


def _has_gap(squares: Tensor, rank: int) -> bool:
    """Whether singular value R + 1 is smaller than R, given descending squared values.

    Without a gap the rank-R approximation, and so the mask, is one of many equally good ones.
    Behind an exact lower rank there is nothing left to choose from, which is as good as a gap.
    """
    sigma = squares.clamp_min(0).sqrt()
    if sigma.numel() <= rank:
        return True
    return bool(sigma[rank] <= max((1 - MIN_GAP) * sigma[rank - 1], MIN_GAP * sigma[0]))


def _orthonormal_against(block: Tensor, basis: list[Tensor]) -> Tensor | None:
    """`block` made orthonormal and orthogonal to `basis`; None where nothing new is left in it."""
    before = block.norm()
    for _ in range(2):
        for known in basis:
            block = block - known @ (known.T @ block)
    if not before > 0 or block.norm() <= 1e-6 * before:
        return None
    block = torch.linalg.qr(block).Q
    # A nearly dependent column comes out of QR as noise, which need not be orthogonal to the
    # basis: project once more.
    for known in basis:
        block = block - known @ (known.T @ block)
    return torch.linalg.qr(block).Q


def _sample_rows(m: int, n: int, device: torch.device) -> Tensor:
    """Evenly spaced rows that hold about SAMPLE_ENTRIES entries."""
    wanted = min(m, max(64, SAMPLE_ENTRIES // n))
    return torch.linspace(0, m - 1, wanted, dtype=torch.float64).round().long().unique().to(device)


def _top_mask(scores: Tensor, count: int) -> Tensor:
    flat = scores.abs().reshape(-1)
    mask = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    mask[torch.topk(flat, count, sorted=False).indices] = True
    return mask
