"""Differences of methods, with standard errors from a paired bootstrap over rows.

Every run answers the same rows. A resample draws as many rows of each set as there are, with
repetition, the same ones for all runs; a figure is computed anew from each resample, and the
standard deviation over resamples is its standard error. What all methods find hard or easy cancels
in a difference.

What is kept is compared where as much is learned. A method's curve goes from the base (its target
loss before, no increase) through its learning rates up to the best one. The level is the target
loss of the worse of two methods at its best learning rate, and the better one's increase there
is interpolated on its curve.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.quality.real.texts import SOURCES


@dataclass(frozen=True)
class Curve:
    """A method at one budget.

    Attributes:
        lrs: learning rates, ascending; L of them.
        nats: by set, of each row, in the mean over the seeds that were run [L, N].
        best: which learning rate is reported.
    """

    lrs: tuple[float, ...]
    nats: Mapping[str, Tensor]
    best: int


@dataclass(frozen=True)
class Figure:
    """A value, and its standard error."""

    value: float
    error: float

    @property
    def sure(self) -> bool:
        """Whether it is more than two standard errors from nothing."""
        return abs(self.value) > 2 * self.error


@dataclass(frozen=True)
class Measured:
    """Of a curve, for all rows [0] and for every resample [1:].

    Attributes:
        target: loss of the target's test rows [S, L].
        increase: of the source's loss, in the mean over its kinds [S, L].
        before: the target's loss of the base [S].
        best: which learning rate is reported.
    """

    target: Tensor
    increase: Tensor
    before: Tensor
    best: int

    def at_best(self) -> tuple[Tensor, Tensor]:
        """Target loss and source increase at the best learning rate [S]."""
        return self.target[:, self.best], self.increase[:, self.best]

    def increase_at(self, level: Tensor) -> Tensor:
        """The increase where the target's loss first falls to a level [S], on the way from the
        base to the best learning rate; none where the base is there already."""
        nothing = torch.zeros_like(self.before)
        last = slice(0, self.best + 1)
        losses = torch.cat([self.before.unsqueeze(1), self.target[:, last]], 1)
        increases = torch.cat([nothing.unsqueeze(1), self.increase[:, last]], 1)
        found, open_ = nothing.clone(), losses[:, 0] > level
        for at in range(losses.shape[1] - 1):
            a, b = losses[:, at], losses[:, at + 1]
            here = open_ & (b <= level)
            share = torch.where(here, (a - level) / (a - b).clamp(min=1e-12), nothing)
            found = torch.where(
                here, increases[:, at] + share * (increases[:, at + 1] - increases[:, at]), found
            )
            open_ = open_ & ~here
        return torch.where(open_, self.increase[:, self.best], found)


class Bootstrap:
    """Resamples of the rows, the same for all curves.

    Args:
        tokens: by set, tokens that count in each row [N].
        resamples: how many.
        seed: of the draws.
    """

    def __init__(self, tokens: Mapping[str, Tensor], resamples: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = dict(tokens)
        self.draws = {}
        for name, of in self.tokens.items():
            n = len(of)
            drawn = torch.randint(n, (resamples, n), generator=generator)
            counts = torch.zeros(resamples, n, dtype=torch.float64)
            counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
            self.draws[name] = torch.cat([torch.ones(1, n, dtype=torch.float64), counts])

    def mean(self, name: str, nats: Tensor) -> Tensor:
        """Nats per token of a set's rows [.., N], in every resample: [S, ..]."""
        draws = self.draws[name]
        tokens = draws @ self.tokens[name]
        sums = draws @ nats.T if nats.dim() == 2 else draws @ nats
        return sums / (tokens.unsqueeze(1) if nats.dim() == 2 else tokens)

    def measure(self, curve: Curve, base: Mapping[str, Tensor]) -> Measured:
        """Of a curve whose base has these nats by set [N]."""
        rises = [
            self.mean(name, curve.nats[name]) - self.mean(name, base[name]).unsqueeze(1)
            for name in SOURCES
        ]
        return Measured(
            self.mean("test", curve.nats["test"]),
            torch.stack(rises).mean(0),
            self.mean("test", base["test"]),
            curve.best,
        )


def figure(samples: Tensor) -> Figure:
    """Of a value for all rows [0] and for every resample [1:]."""
    return Figure(float(samples[0]), float(samples[1:].std()))


def learned(one: Measured, other: Measured) -> Figure:
    """By how much the first's target loss is above the second's, each at its best."""
    return figure(one.at_best()[0] - other.at_best()[0])


def forgotten(one: Measured, other: Measured) -> Figure:
    """By how much the first's source loss has risen more than the second's, where both have
    learned as much as the one that learned less."""
    a, b = increases_at_equal_target(one, other)
    return figure(a - b)


def increases_at_equal_target(one: Measured, other: Measured) -> tuple[Tensor, Tensor]:
    """What source losses have risen by, where the target's loss is the worse one's best [S]."""
    level = torch.maximum(one.at_best()[0], other.at_best()[0])
    return one.increase_at(level), other.increase_at(level)
