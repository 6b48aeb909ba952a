"""Which entries of a matrix to train.

    select(tiles, scorer, count) -> sorted flat int64 positions

`tiles` is a 2-D tensor or anything that can be read by rows; it is never held whole. Extra
memory: one tile, the scorer's factors, and O(count).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leanlift.errors import UserError
from leanlift.selection.scorers import Magnitude, Principal, Random, Scorer
from leanlift.selection.topk import StreamedTopK
from leanlift.tiles import RowTiles, as_tiles, row_ranges, tile_rows

__all__ = [
    "Magnitude",
    "Principal",
    "Random",
    "Scorer",
    "Selection",
    "count_by_density",
    "count_by_rank",
    "select",
    "selection",
]


@dataclass(frozen=True)
class Selection:
    """flat: sorted int64 positions [count]. converged: whether the scores had settled."""

    flat: Tensor
    converged: bool


def select(tiles: RowTiles | Tensor, scorer: Scorer, count: int) -> Tensor:
    """The `count` entries with the largest scores, as sorted flat int64 positions.

    Ties go to the lower position.

    Raises:
        ValueError: count outside 0..m*n, or a matrix with NaN or infinite entries.
    """
    return selection(tiles, scorer, count).flat


@torch.no_grad()
def selection(
    tiles: RowTiles | Tensor, scorer: Scorer, count: int, name: str = "the matrix"
) -> Selection:
    """As `select`, and says whether the scorer converged. `name` is used in errors."""
    tiles = as_tiles(tiles)
    m, n = tiles.shape
    if not 0 <= count <= m * n:
        raise UserError(
            f"expected to select 0 to {m * n} entries of {name} ({m}x{n}), got {count}."
        )
    step = tile_rows(n, 4)
    _refuse_non_finite(tiles, step, name)
    scores = scorer.prepare(tiles, count)
    top = StreamedTopK(count)
    for start, stop in row_ranges(m, step):
        top.push(scores.scores(start, stop).reshape(-1), start * n)
    return Selection(top.flat().to(tiles.device), scores.converged)


def _refuse_non_finite(tiles: RowTiles, step: int, name: str) -> None:
    bad = sum(
        int((~torch.isfinite(tiles.rows(start, stop))).sum())
        for start, stop in row_ranges(tiles.shape[0], step)
    )
    if bad:
        raise UserError(
            f"{name} has {bad} NaN or infinite weights of {tiles.shape[0] * tiles.shape[1]}: "
            "the checkpoint is damaged, load another one."
        )


def count_by_density(shape: tuple[int, int], density: float) -> int:
    """⌊density · m · n⌋."""
    return int(density * shape[0] * shape[1])


def count_by_rank(shape: tuple[int, int], rank_budget: int) -> int:
    """r · (m + n): the parameters of a rank-r LoRA on the same matrix."""
    return rank_budget * (shape[0] + shape[1])
