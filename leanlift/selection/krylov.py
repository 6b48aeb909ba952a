"""The best rank-R approximation by a block Krylov iteration with Rayleigh-Ritz projection (Musco &
Musco, arXiv 1504.05477): two thin products with each block of rows per step, one sweep over the
matrix per step.

A fixed number of steps does not give the right mask, so the iteration goes on until the mask itself
has stopped moving: the top entries of a fixed sample of rows are compared from step to step.

The blocks are a third as wide as the R directions that are wanted: for the same columns the
Krylov polynomial then has three times the degree, and the same mask is reached with fewer columns
to multiply, to keep orthogonal and to diagonalize. Narrower ones still would read the matrix too
often.

Shapes: m rows, n columns, R rank, w = R + oversampling, b block width, c columns of the basis.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from leanlift.selection.blocks import block_rows, read_blocks
from leanlift.selection.lowrank import RESOLUTION_KRYLOV, LowRank, has_gap
from leanlift.tiles import RowTiles, row_ranges

OVERSAMPLING = 8
NARROW, NARROWEST = 3, 24
"""A block has w / 3 columns, rounded up to a multiple of 8: at least 24, at most w."""

LIMIT = 6
"""Times w columns held before the subspace is cut back to its best directions (a thick restart).
Weights like trained ones have converged by then, so most matrices never restart."""

KEPT = 2
"""Times w directions that a restart keeps: more than the R wanted, which is what lets a slow
iteration go on where it was."""

FIRST_LOOK = 2.5
"""Times w columns at which the mask is first looked at; with fewer it is far off."""

SAMPLE_ENTRIES = 2**19


class _Subspace:
    """An orthonormal basis of right directions [n, c] and its image W @ basis [m, c].

    Holds at most LIMIT times w columns, and the fp64 Gram matrix of the image, from which the
    best directions inside the subspace follow (Rayleigh-Ritz).
    """

    def __init__(self, m: int, n: int, rank: int, device: torch.device) -> None:
        self.wanted = wanted_columns(m, n, rank)
        self.width = block_width(m, n, rank)
        self.limit = most_columns(m, n, rank)
        self.kept = min(KEPT * self.wanted, self.limit - self.width)
        self.columns = 0
        self._basis = torch.empty(n, self.limit, device=device)
        self._image = torch.empty(m, self.limit, device=device)
        self._gram = torch.empty(self.limit, self.limit, dtype=torch.float64, device=device)

    @property
    def basis(self) -> Tensor:
        return self._basis[:, : self.columns]

    @property
    def image(self) -> Tensor:
        return self._image[:, : self.columns]

    @property
    def full(self) -> bool:
        return self.columns + self.width > self.limit

    def append(self, block: Tensor, image: Tensor) -> None:
        start, self.columns = self.columns, self.columns + block.shape[1]
        self.basis[:, start:] = block
        self.image[:, start:] = image
        self._measure(start)

    def _measure(self, start: int) -> None:
        """The Gram matrix of the image, from column `start` on."""
        cross = self._gram[: self.columns, start : self.columns]
        cross.zero_()
        for a, b in row_ranges(self.image.shape[0], 1024):
            rows = self.image[a:b].double()
            cross.addmm_(rows.T, rows[:, start:])
        self._gram[start : self.columns, : self.columns] = cross.T

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Squared singular values inside the subspace, descending, and their directions in the
        basis [c, c]. By eigenvectors: an SVD may fail on repeated values."""
        squares, turn = torch.linalg.eigh(self._gram[: self.columns, : self.columns])
        return squares.flip(0), turn.flip(1).float()

    def restart(self, turn: Tensor) -> None:
        """Cut back to the best directions, in place by rows."""
        keep = turn[:, : self.kept]
        for thin in (self.basis, self.image):
            for a, b in row_ranges(thin.shape[0], 1024):
                thin[a:b, : self.kept] = thin[a:b] @ keep
        self.columns = self.kept
        self._measure(0)

    def orthonormal(self, block: Tensor) -> Tensor | None:
        """`block` made orthonormal and orthogonal to the basis; None where nothing new is left.

        A nearly dependent column comes out of QR as noise, which need not be orthogonal to the
        basis: hence the further rounds.
        """
        before = block.norm()
        block = self._project_out(block)
        if not before > 0 or block.norm() <= 1e-6 * before:
            return None
        block = torch.linalg.qr(block).Q
        for _ in range(4):
            again = self._project_out(block)
            if (again - block).norm() <= 1e-4:
                return again
            block = torch.linalg.qr(again).Q
        return block

    def _project_out(self, block: Tensor) -> Tensor:
        return block - self.basis @ (self.basis.T @ block)


def krylov_factors(
    tiles: RowTiles,
    rank: int,
    count: int,
    tile_bytes: int,
    tolerance: float,
    max_steps: int,
    seed: int,
) -> LowRank:
    """Rank-R factors from a restarted block Krylov iteration that stops when the mask is still.

    Args:
        tiles: the matrix.
        rank: R, at most min(m, n).
        count: entries of the mask; decides what has to converge.
        tile_bytes: bytes of rows that are read at once.
        tolerance: the largest share of the sampled mask that may still be wrong, see
            `_Stillness`.
        max_steps: gives up after so many sweeps; the result then says `converged=False`.
        seed: of the random start.

    Memory beyond the tile: see `krylov_nbytes`.
    """
    m, n = tiles.shape
    space = _Subspace(m, n, rank, tiles.device)
    start = _RandomBlocks(n, space, seed)
    block = start.draw()
    assert block is not None
    first_look = math.ceil(FIRST_LOOK * space.wanted / space.width)
    every = 1 if space.width == space.wanted else 2
    sample = _sample_rows(m, n, tiles.device)
    sampled_count = max(1, round(count * sample.numel() / m))
    still = _Stillness(tolerance, sampled_count)
    for steps in range(1, max_steps + 1):
        image, following = _sweep(tiles, block, tile_bytes)
        space.append(block, image)
        look = steps == max_steps or (steps >= first_look and (steps - first_look) % every == 0)
        if not look and not space.full:
            extension = _or_random(space.orthonormal(following), start)
            if extension is not None:
                block = extension
                continue
        squares, turn = space.ritz()
        right = space.basis @ turn[:, :rank]
        if look:
            still.see(_top_mask((space.image[sample] @ turn[:, :rank]) @ right.T, sampled_count))
        # What W^T W adds to the subspace, before the subspace is cut back: the part of it that a
        # restart discards must not come in again.
        extension = None if still.reached else _or_random(space.orthonormal(following), start)
        if extension is None or steps == max_steps:
            left = space.image @ turn[:, :rank]
            sure = extension is None and has_gap(squares, rank)
            return LowRank(left, right, sure, steps, RESOLUTION_KRYLOV)
        if space.full:
            space.restart(turn)
            extension = space.orthonormal(extension)  # noise, where the space was nearly full
            assert extension is not None
        block = extension
    raise AssertionError("max_steps is at least 1")


class _RandomBlocks:
    """Where the iteration starts, and starts again when nothing new follows.

    A Krylov space that starts from b columns sees at most b directions of each singular value,
    so an invariant subspace says that all is found only after w random columns: the R leading
    directions cannot hide from so many.
    """

    def __init__(self, n: int, space: _Subspace, seed: int) -> None:
        self.n = n
        self.space = space
        self.drawn = 0
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self) -> Tensor | None:
        """Orthonormal [n, b], orthogonal to the subspace; None after w columns."""
        if self.drawn >= self.space.wanted:
            return None
        self.drawn += self.space.width
        block = torch.randn(self.n, self.space.width, generator=self._generator)
        return self.space.orthonormal(block.to(self.space.basis.device))


def _or_random(extension: Tensor | None, start: _RandomBlocks) -> Tensor | None:
    return start.draw() if extension is None else extension


def wanted_columns(m: int, n: int, rank: int) -> int:
    """w: the R directions and a few more, for a gap."""
    return min(rank + OVERSAMPLING, m, n)


def block_width(m: int, n: int, rank: int) -> int:
    """b: columns of one Krylov block."""
    wanted = wanted_columns(m, n, rank)
    return min(wanted, max(NARROWEST, -(-wanted // (8 * NARROW)) * 8))


def most_columns(m: int, n: int, rank: int) -> int:
    """c at most, in whole blocks."""
    width = block_width(m, n, rank)
    return max(1, min(LIMIT * wanted_columns(m, n, rank), m, n) // width) * width


class _Stillness:
    """Whether a mask that changes less and less has stopped moving.

    A small change alone says little: where the singular values lie close, many small changes are
    still to come. With changes that shrink by a factor r per step, r / (1 - r) times the last one
    is left. That remainder, over another 1 - r because r itself is an estimate and matters most
    near 1, must be below the tolerance. A slow iteration moves unevenly, so there the largest of
    the last three changes counts. A mask that has not changed at all must have done so twice,
    since in a sample it happens by chance.

    Args:
        tolerance: share of the mask.
        count: entries of the mask.
    """

    SLOW, SLOWEST = 0.5, 0.98
    WINDOW = 7  # changes are uneven between two restarts, which are about six looks apart

    def __init__(self, tolerance: float, count: int) -> None:
        self.tolerance = tolerance
        self.count = count
        self.reached = False
        self._previous: Tensor | None = None
        self._changes: list[float] = []

    def see(self, mask: Tensor) -> None:
        """Take the mask of the next step into account."""
        if self._previous is not None:
            same = float((mask & self._previous).sum())
            self._changes.append(1.0 - same / self.count)
            self.reached = self._still(self._changes[-self.WINDOW :])
        self._previous = mask

    def _still(self, changes: list[float]) -> bool:
        now, earlier = changes[-1], changes[-2::-1]
        if not earlier or now > 10 * self.tolerance:
            return False
        if now == 0:
            return earlier[0] == 0
        rates = [(now / c) ** (1 / lag) if c else 1.0 for lag, c in enumerate(earlier, start=1)]
        rate = min(self.SLOWEST, max(rates))
        if rate > self.SLOW:
            now = max(changes[-3:])
        return now * rate / (1 - rate) ** 2 <= self.tolerance


def krylov_nbytes(shape: tuple[int, int], rank: int) -> int:
    """Peak bytes of `krylov_factors` beyond its tile: the basis and its image, a QR's copies, the
    sample, and one fp32 block of rows."""
    m, n = shape
    width, columns = block_width(m, n, rank), most_columns(m, n, rank)
    sample = 9 * (min(m, max(64, SAMPLE_ENTRIES // n)) * n)  # scores, two masks, their top-k
    space = 4 * (m + n) * columns + 3 * 8 * columns * columns
    passing = 4 * (m + 5 * n) * width + 8 * 1024 * columns
    return space + passing + 4 * (m + n) * rank + sample + 4 * block_rows(m) * n


def _sweep(tiles: RowTiles, block: Tensor, tile_bytes: int) -> tuple[Tensor, Tensor]:
    """W @ block and W^T @ (W @ block) in one pass over the matrix."""
    image = torch.empty(tiles.shape[0], block.shape[1], device=block.device)
    back = torch.zeros(block.shape[1], block.shape[0], device=block.device)  # the faster way round
    for start, stop, rows in read_blocks(tiles, tile_bytes, torch.float32):
        torch.mm(rows, block, out=image[start:stop])
        back.addmm_(image[start:stop].T, rows)
    return image, back.T


def _sample_rows(m: int, n: int, device: torch.device) -> Tensor:
    """Evenly spaced rows that hold about SAMPLE_ENTRIES entries."""
    wanted = min(m, max(64, SAMPLE_ENTRIES // n))
    return torch.linspace(0, m - 1, wanted, dtype=torch.float64).round().long().unique().to(device)


def _top_mask(scores: Tensor, count: int) -> Tensor:
    flat = scores.abs_().reshape(-1)
    mask = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    mask[torch.topk(flat, count, sorted=False).indices] = True
    return mask
