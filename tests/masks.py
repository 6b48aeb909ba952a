"""Masks by their kind, for what depends on where entries lie."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from leanlift.selection import Principal, count_by_density, select
from leanlift.sparse import SegmentedIndex


def index_of(mask: Tensor) -> SegmentedIndex:
    """Of a mask [m, n], bool."""
    m, n = mask.shape
    return SegmentedIndex.from_flat(mask.reshape(-1).nonzero().squeeze(1), (m, n))


def crowded(m: int, n: int, density: float = 0.05) -> SegmentedIndex:
    """Principal entries, as of a trained matrix: a few directions, and rows and columns of very
    different size."""
    generator = torch.Generator().manual_seed(5)
    low = torch.randn(m, 4, generator=generator) @ torch.randn(4, n, generator=generator)
    weight = low + 0.3 * torch.randn(m, n, generator=generator)
    weight *= torch.exp(torch.randn(m, 1, generator=generator))
    weight *= torch.exp(torch.randn(1, n, generator=generator))
    count = count_by_density((m, n), density)
    return SegmentedIndex.from_flat(select(weight, Principal(rank=4), count), (m, n))


def few(m: int, n: int) -> SegmentedIndex:
    """Entries in some rows of some columns; none in the first and the last row."""
    mask = torch.zeros(m, n, dtype=torch.bool)
    mask[1 : m // 3, ::5] = True
    mask[m // 2 : -1 : 7, 1::9] = True
    return index_of(mask)


def _one_row(m: int, n: int) -> SegmentedIndex:
    mask = torch.zeros(m, n, dtype=torch.bool)
    mask[m // 2] = True
    return index_of(mask)


def _one_column(m: int, n: int) -> SegmentedIndex:
    mask = torch.zeros(m, n, dtype=torch.bool)
    mask[:, n // 2] = True
    return index_of(mask)


def _random(m: int, n: int) -> SegmentedIndex:
    return index_of(torch.rand(m, n, generator=torch.Generator().manual_seed(3)) < 0.05)


MASKS: dict[str, Callable[[int, int], SegmentedIndex]] = {
    "empty": lambda m, n: index_of(torch.zeros(m, n, dtype=torch.bool)),
    "full": lambda m, n: SegmentedIndex.full((m, n)),
    "one row": _one_row,
    "one column": _one_column,
    "random": _random,
    "principal": crowded,
}
