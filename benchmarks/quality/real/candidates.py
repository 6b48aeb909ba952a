"""Other ways to choose the entries, looked for: what might be better than principal weights.

Each is principal weights with one thing changed, over NF4, with as many entries in all. Nothing of
it is in the library unless the benchmark says that it pays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.quality.real.gradients import squares
from benchmarks.quality.real.methods import Build, Prepared, Setting
from leanlift import LiftConfig
from leanlift.model import claim
from leanlift.model.attach import Choice, attach
from leanlift.model.base import LiveBase, stock_base
from leanlift.selection import Favoring, Gradient, Magnitude, Principal, count_by_rank, select
from leanlift.selection.scorers import RowScores, Scorer, ScorerBytes
from leanlift.sparse import SegmentedIndex
from leanlift.tiles import DEFAULT_TILE_BYTES, RowTiles
from leanlift.training.rates import rate_factors
from leanlift.weights.quantized import frozen_weight

RANK = LiftConfig().approx_rank
MOST = 0.5
"""Of a matrix that is trained, where budgets differ."""

Masks = dict[str, Tensor]
"""Sorted flat positions by the name of the matrix."""
ChooseAll = Callable[[Setting, LiveBase], Masks]


def chosen(choose: ChooseAll, scaled: bool = False) -> Build:
    """leanlift at the positions that `choose` gives; `scaled`: the learning rate of a matrix goes
    with the root mean square of its weights."""

    def build(setting: Setting) -> Prepared:
        model = setting.base.load("nf4")
        live = stock_base(model, list(setting.base.shapes))
        masks = choose(setting, live)

        def one(name: str, weight: RowTiles) -> Choice:
            return Choice(SegmentedIndex.from_flat(masks[name], weight.shape), True)

        config = LiftConfig(rank_budget=setting.r)
        attach(model, config, live, one, "Selecting", False, sample=False)
        claim(model)
        return Prepared(model, lr_factors=_by_scale(model) if scaled else {})

    return build


def each(score: Callable[[Setting, str], Scorer]) -> ChooseAll:
    """Of every matrix the entries with the largest scores, r·(m+n) of them."""

    def choose(setting: Setting, live: LiveBase) -> Masks:
        return {
            name: select(live.weights[name], score(setting, name), _count(setting, live, name))
            for name in live.facts.shapes
        }

    return choose


def _count(setting: Setting, live: LiveBase, name: str) -> int:
    return count_by_rank(live.weights[name].shape, setting.r)


def principal(setting: Setting, name: str) -> Scorer:
    return Principal(RANK)


def times_gradient(setting: Setting, name: str) -> Scorer:
    """|W'| times the root of the accumulated squared gradient."""
    return Times(Principal(RANK), squares(setting)[name].sqrt())


def gradient_alone(setting: Setting, name: str) -> Scorer:
    """The accumulated squared gradient (Fisher information's diagonal)."""
    return Gradient(squares(setting)[name])


def off_principal(setting: Setting, live: LiveBase) -> Masks:
    """Principal among what is not already large: without the r·(m+n) largest weights."""
    masks = {}
    for name in live.facts.shapes:
        weight, count = live.weights[name], _count(setting, live, name)
        largest = SegmentedIndex.from_flat(select(weight, Magnitude(), count), weight.shape)
        masks[name] = select(weight, Favoring(Principal(RANK), largest, -1.0), count)
    return masks


def by_gradient(setting: Setting, live: LiveBase) -> Masks:
    """Principal, with budgets that go with the root mean square of a matrix's gradient."""
    norms = {name: float(square.mean().sqrt()) for name, square in squares(setting).items()}
    total = sum(_count(setting, live, name) for name in live.facts.shapes)
    counts = budgets(norms, dict(live.facts.shapes), total)
    return {n: select(live.weights[n], Principal(RANK), counts[n]) for n in live.facts.shapes}


def budgets(
    norms: Mapping[str, float], shapes: Mapping[str, tuple[int, int]], total: int
) -> dict[str, int]:
    """Entries of each matrix: in proportion to its size times its norm, at most MOST of it, and
    `total` in all (less what is rounded off)."""
    room = {name: int(MOST * m * n) for name, (m, n) in shapes.items()}
    counts: dict[str, int] = {}
    while len(counts) < len(shapes):
        left = total - sum(counts.values())
        open_ = [name for name in shapes if name not in counts]
        weight = {name: norms[name] * math.prod(shapes[name]) for name in open_}
        share = left / sum(weight.values())
        full = [name for name in open_ if share * weight[name] >= room[name]]
        for name in full or open_:
            counts[name] = room[name] if full else max(1, int(share * weight[name]))
    return counts


def rows(setting: Setting, live: LiveBase) -> Masks:
    """Whole rows, those whose part of the approximation has the largest norm."""
    masks = {}
    for name in live.facts.shapes:
        weight = live.weights[name]
        m, n = weight.shape
        scores = Principal(RANK).prepare(weight, 1, DEFAULT_TILE_BYTES).scores(0, m)
        kept = scores.square().sum(1).topk(max(1, _count(setting, live, name) // n)).indices
        masks[name] = (kept.sort().values.unsqueeze(1) * n + torch.arange(n)).view(-1)
    return masks


def blocks(side: int) -> ChooseAll:
    """Whole blocks, those whose part of the approximation is largest."""
    return each(lambda setting, name: Principal(RANK, block=side))


def from_original(setting: Setting, live: LiveBase) -> Masks:
    """Principal weights of the checkpoint as stored, not of what NF4 has left of it."""
    model = setting.base.load("16")
    return {
        name: select(
            frozen_weight(model.get_submodule(name)), Principal(RANK), _count(setting, live, name)
        )
        for name in live.facts.shapes
    }


@dataclass(frozen=True)
class Times:
    """Another scorer's scores times those of a matrix [m, n]."""

    scorer: Scorer
    factor: Tensor
    block: int = 1

    def prepare(self, tiles: RowTiles, count: int, tile_bytes: int) -> RowScores:
        return _TimesScores(self.scorer.prepare(tiles, count, tile_bytes), self.factor)

    def nbytes(self, shape: tuple[int, int]) -> ScorerBytes:
        return self.scorer.nbytes(shape)


@dataclass(frozen=True)
class _TimesScores:
    inner: RowScores
    factor: Tensor
    resolution: float = 0.0

    @property
    def converged(self) -> bool:
        return self.inner.converged

    def scores(self, start: int, stop: int) -> Tensor:
        return self.inner.scores(start, stop) * self.factor[start:stop]


def _by_scale(model: torch.nn.Module) -> dict[str, float]:
    """By parameter, the root mean square of its matrix over the geometric mean of all."""
    return {f"{name}.values": factor for name, factor in rate_factors(model).items()}
