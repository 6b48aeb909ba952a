"""Where the trained entries lie: the adapter's matrices as a grid of layers and kinds."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from leanlift.report.adapter import AdapterFacts, Matrix

MOST_KINDS = 14


@dataclass(frozen=True)
class Grid:
    """Layers, kinds of matrix, and the matrices of each cell: several where there are experts."""

    layers: list[str]
    kinds: list[str]
    cells: dict[tuple[str, str], list[Matrix]]

    def values(self, of: Callable[[list[Matrix]], float]) -> list[list[float | None]]:
        """A value per layer and kind; None where there is no such matrix."""
        return [
            [
                of(self.cells[layer, kind]) if (layer, kind) in self.cells else None
                for kind in self.kinds
            ]
            for layer in self.layers
        ]


def grid_of(adapter: AdapterFacts) -> Grid:
    """The grid of an adapter: `model.layers.3.mlp.up_proj` is layer 3, kind up_proj; a number that
    comes later (an expert's) joins what differs in it alone."""
    placed = [(*place_of(matrix.module), matrix) for matrix in adapter.matrices]
    short = {kind: kind.rpartition(".")[2] for _, kind, _ in placed}
    if len(set(short.values())) < len(short):  # two kinds of one last name
        short = {kind: kind for kind in short}
    cells: dict[tuple[str, str], list[Matrix]] = {}
    for layer, kind, matrix in placed:
        cells.setdefault((layer, short[kind]), []).append(matrix)
    kinds = list(dict.fromkeys(kind for _, kind in cells))[:MOST_KINDS]
    return Grid(list(dict.fromkeys(layer for layer, _ in cells)), kinds, cells)


def place_of(module: str) -> tuple[str, str]:
    """Layer and kind of a module; layer "–" for one that is in none."""
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", module)
    if match is None:
        return "–", module
    return match[1], re.sub(r"(?<=\.)\d+(?=\.)", "*", match[2])


def share_of(matrices: list[Matrix]) -> float:
    """Trained share of their weights."""
    weights = sum(m.shape[0] * m.shape[1] for m in matrices)
    return sum(matrix.entries for matrix in matrices) / weights


def mean_of(matrices: list[Matrix]) -> float:
    """Mean absolute change of their trained and retired entries."""
    count = sum(matrix.entries + matrix.retired for matrix in matrices)
    total = sum(matrix.mean * (matrix.entries + matrix.retired) for matrix in matrices)
    return total / count if count else 0.0
