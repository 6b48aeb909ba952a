"""Squared gradients of every matrix over the calibration batches, made once a process."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.quality.real.methods import Setting, as_batch
from leanlift.model.attach import frozen_layers
from leanlift.model.base import stock_base

Squares = dict[str, Tensor]
_kept: dict[tuple[str, int, str], Squares] = {}


def squares(setting: Setting) -> Squares:
    """Sum over batches of the squared gradient, fp32 [m, n] by matrix, over the base in NF4; those
    of the last setting are kept."""
    key = (str(setting.base.path.resolve()), setting.seed, str(setting.calibration))
    if key not in _kept:
        _kept.clear()
        _kept[key] = made(setting)
    return _kept[key]


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
