"""The two routes to a low-rank approximation, and shapes to try them on."""

from __future__ import annotations

import pytest
from helpers import (
    top_oracle,
)
from torch import Tensor

from leanlift.selection.gram import gram_factors
from leanlift.selection.krylov import krylov_factors
from leanlift.selection.lowrank import LowRank
from leanlift.tiles import RowTiles

SHAPES = [(192, 192), (320, 128), (128, 320), (257, 131)]
RANK = 16


def _shape_id(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


each_shape = pytest.mark.parametrize("shape", SHAPES, ids=_shape_id)
each_route = pytest.mark.parametrize("route", ["gram", "krylov"])


def _factors(route: str, tiles: RowTiles, rank: int, count: int) -> LowRank:
    if route == "gram":
        return gram_factors(tiles, rank, 2**20)
    return krylov_factors(tiles, rank, count, 2**20, tolerance=1e-4, max_steps=30, seed=0)


def _mask(factors: LowRank, m: int, count: int) -> Tensor:
    return top_oracle(factors.scores(0, m), count)
