"""Squared gradients of every matrix over the calibration batches, made once a process."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from benchmarks.quality.real.methods import Setting, as_batch
from leanlift.model.attach import frozen_layers
from leanlift.model.base import stock_base

Squares = dict[str, Tensor]


def squares(setting: Setting) -> Squares:
    """Sum over batches of the squared gradient, fp32 [m, n] by matrix, over the base in NF4."""
    return _kept(Kept(setting))


class Kept:
    """A setting, known by what its squares depend on."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        rows = [row.ids for batch in setting.calibration for row in batch]
        self.key = (str(setting.base.path.resolve()), setting.seed, hash(str(rows)))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Kept) and self.key == other.key


@lru_cache(1)
def _kept(kept: Kept) -> Squares:
    return made(kept.setting)


def made(setting: Setting) -> Squares:
    """The same, made anew."""
    base = setting.base
    model = base.load("nf4")
    live = stock_base(model, list(base.shapes))
    found = {
        name: torch.zeros(live.weights[name].shape, device=base.device)
        for name in live.facts.shapes
    }
    with frozen_layers(model, live.weights) as layers:
        for name in found:
            layers[name].observer = _Adds(found[name])
        for rows in setting.calibration:
            with base.autocast():
                loss = model(**as_batch(rows, base), use_cache=False).loss
            loss.backward()
    return found


class _Adds:
    """Adds the square of one backward pass's gradient; each layer is met once in one."""

    def __init__(self, total: Tensor) -> None:
        self.total = total

    def __call__(self, x: Tensor, grad_y: Tensor, first: int = 0) -> None:
        share = (grad_y.T @ x.to(grad_y.dtype)).float().square_()
        self.total[first : first + grad_y.shape[1]] += share
