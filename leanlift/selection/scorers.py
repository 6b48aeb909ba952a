"""What makes an entry worth training: the scorers.

A scorer is a small frozen object. `prepare(tiles, count, tile_bytes)` looks at the matrix and
returns row scores, non-negative fp32; the streamed top-k does the rest. `nbytes(shape)` is what
that takes in memory beyond the tile, at its peak and afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from leanlift.selection.blocks import block_rows
from leanlift.selection.gram import gram_factors, gram_nbytes
from leanlift.selection.krylov import krylov_factors, krylov_nbytes
from leanlift.tiles import RowTiles, as_tiles


class RowScores(Protocol):
    """Non-negative fp32 scores that can be read by rows.

    `converged` says whether they are the one right answer, `resolution` down to which share of the
    largest score they are more than noise.
    """

    @property
    def converged(self) -> bool:
        """Whether the scores are the one right answer."""

    @property
    def resolution(self) -> float:
        """The share of the largest score down to which scores are more than noise."""

    def scores(self, start: int, stop: int) -> Tensor:
        """Scores of rows `start:stop`, [stop - start, n], in a tensor of the caller's own."""
        ...


class ScorerBytes(NamedTuple):
    """Bytes beyond the tiles: at the peak of `prepare`, and kept for the scores; and how many
    tiles are held at once."""

    peak: int
    kept: int
    tiles: int = 1


class Scorer(Protocol):
    """Scores the entries of a matrix that is seen through row tiles.

    `block` is the side of the square blocks that are taken whole; 1 for single entries.
    """

    @property
    def block(self) -> int:
        """The side of the square blocks that are taken whole; 1 for single entries."""

    def prepare(self, tiles: RowTiles, count: int, tile_bytes: int) -> RowScores:
        """Look at the matrix, in tiles of `tile_bytes`, for a mask of `count` entries."""

    def nbytes(self, shape: tuple[int, int]) -> ScorerBytes: ...


@dataclass(frozen=True)
class Principal:
    """|best rank-R approximation of W|: the principal weights (LIFT, arXiv 2506.00772, sec. 3).

    Args:
        rank: R. The paper takes 16 to 128; at or below the rank budget works best.
        block: b; above 1, scores are summed over b x b blocks and whole blocks are taken (the
            paper's structured variant, b = 4).
        tolerance: share of the mask that may still be wrong when the Krylov iteration stops, as
            estimated from how fast a sample of it comes to rest.
        max_steps: sweeps over the matrix after which the iteration gives up and says so.
        seed: of the Krylov start; where there is a gap behind rank R the result does not depend
            on it beyond rounding.
    """

    rank: int = 64
    block: int = 1
    tolerance: float = 2.5e-4
    max_steps: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.block < 1 or self.max_steps < 1:
            raise ValueError(f"expected rank, block and max_steps of at least 1, got {self}")

    def prepare(self, tiles: RowTiles, count: int, tile_bytes: int) -> RowScores:
        m, n = tiles.shape
        if self.rank >= min(m, n):
            return _MagnitudeScores(tiles)
        if _gram_is_cheaper(m, n, self.rank):
            return gram_factors(tiles, self.rank, tile_bytes)
        return krylov_factors(
            tiles, self.rank, count, tile_bytes, self.tolerance, self.max_steps, self.seed
        )

    def nbytes(self, shape: tuple[int, int]) -> ScorerBytes:
        m, n = shape
        if self.rank >= min(m, n):
            return ScorerBytes(0, 0)
        kept = 4 * (m + n) * self.rank
        if _gram_is_cheaper(m, n, self.rank):
            return ScorerBytes(gram_nbytes(shape, self.rank), kept, tiles=1 if n <= m else 2)
        return ScorerBytes(krylov_nbytes(shape, self.rank), kept)


GRAM_SIDE = 768
"""Up to this side the Gram route takes well under a second, and it cannot fail to converge."""


def _gram_is_cheaper(m: int, n: int, rank: int) -> bool:
    """Compare operations: products in fp64 count twice and an eigensolver takes 25 side^3; seven
    Krylov steps take their products and the orthogonalization, whose thin shapes run at a third
    of the speed (as timed on a CPU at sides of 1000 to 4000).

    Where a few Krylov blocks would fill the whole space, the Gram matrix is the simpler way.
    """
    side, width = min(m, n), rank + 8
    gram = 4 * m * n * side + 25 * side**3
    krylov = 7 * 4 * m * n * width + 200 * (m + n) * width**2
    return side <= GRAM_SIDE or side < 4 * width or gram < 3 * krylov


@dataclass(frozen=True)
class Magnitude:
    """|W| itself."""

    block: int = 1

    def prepare(self, tiles: RowTiles, count: int, tile_bytes: int) -> RowScores:
        return _MagnitudeScores(tiles)

    def nbytes(self, shape: tuple[int, int]) -> ScorerBytes:
        return ScorerBytes(0, 0)


@dataclass(frozen=True)
class Gradient:
    """|accumulated gradient| of the same matrix, however it was come by.

    For a whole quantized model whose dense gradients fit nowhere, `get_lift_model(…,
    calibration=…)` accumulates them in row tiles.

    Args:
        gradient: a 2-D tensor or RowTiles of the matrix's shape.
    """

    gradient: RowTiles | Tensor
    block: int = 1

    def prepare(self, tiles: RowTiles, count: int, tile_bytes: int) -> RowScores:
        gradient = as_tiles(self.gradient)
        if tuple(gradient.shape) != tuple(tiles.shape):
            raise ValueError(f"expected a gradient of shape {tiles.shape}, got {gradient.shape}")
        return _MagnitudeScores(gradient)

    def nbytes(self, shape: tuple[int, int]) -> ScorerBytes:
        return ScorerBytes(0, 0)


@dataclass(frozen=True)
class _MagnitudeScores:
    tiles: RowTiles
    converged: bool = True
    resolution: float = 0.0

    def scores(self, start: int, stop: int) -> Tensor:
        return self.tiles.rows(start, stop).float().abs()


@dataclass(frozen=True)
class Random:
    """A uniformly random mask: a hash of the flat position, the same on every machine."""

    seed: int = 0
    block: int = 1

    def prepare(self, tiles: RowTiles, count: int, tile_bytes: int) -> RowScores:
        return _RandomScores(tiles.shape[1], self.seed, tiles.device)

    def nbytes(self, shape: tuple[int, int]) -> ScorerBytes:
        return ScorerBytes(0, 5 * 8 * block_rows(shape[0]) * shape[1])  # hashes in int64


@dataclass(frozen=True)
class _RandomScores:
    n: int
    seed: int
    device: torch.device
    converged: bool = True
    resolution: float = 0.0

    def scores(self, start: int, stop: int) -> Tensor:
        flat = torch.arange(start * self.n, stop * self.n, device=self.device)
        # 24 bits are exact in fp32.
        return (_mix(flat + _mix_int(self.seed)) >> 40 & 0xFFFFFF).float().view(-1, self.n)


# splitmix64's finalizer (Steele, Lea, Flood 2014), in wrapping int64 arithmetic.
_MIX_1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9 as int64
_MIX_2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB as int64
_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as int64


def _mix(x: Tensor) -> Tensor:
    x = x * _GOLDEN
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _mix_int(seed: int) -> int:
    return int(_mix(torch.tensor([seed])).item())


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical (not arithmetic) right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


class Places(Protocol):
    """A set of positions that can be read by rows."""

    def decode(self, start: int, stop: int) -> Tensor:
        """Flat positions in rows `start:stop`, relative to row `start`: int64."""
        ...


@dataclass(frozen=True)
class Favoring:
    """Another scorer's scores, with those at some places multiplied: hysteresis.

    Args:
        scorer: whose scores they are.
        places: the favored positions, for example those of the present mask.
        margin: their scores count 1 + margin times, so that another entry takes the place of one
            of them only where its score is that much larger.
    """

    scorer: Scorer
    places: Places
    margin: float

    @property
    def block(self) -> int:
        return self.scorer.block

    def prepare(self, tiles: RowTiles, count: int, tile_bytes: int) -> RowScores:
        return _FavoredScores(
            self.scorer.prepare(tiles, count, tile_bytes), self.places, 1 + self.margin
        )

    def nbytes(self, shape: tuple[int, int]) -> ScorerBytes:
        """The scorer's own; what is decoded, 8 bytes per place of a block, is not in it."""
        return self.scorer.nbytes(shape)


@dataclass(frozen=True)
class _FavoredScores:
    inner: RowScores
    places: Places
    factor: float

    @property
    def converged(self) -> bool:
        return self.inner.converged

    @property
    def resolution(self) -> float:
        return self.inner.resolution

    def scores(self, start: int, stop: int) -> Tensor:
        block = self.inner.scores(start, stop)  # made for this call
        block.view(-1)[self.places.decode(start, stop)] *= self.factor
        return block
