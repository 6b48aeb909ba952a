"""How large the change of the weights is, and of how high a rank."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.methods import TARGETS
from leanlift.layers import LiftLinear
from leanlift.weights.quantized import frozen_weight


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the whole weights that are trained in place: those of full fine-tuning."""
    return {
        name: module.weight.detach().clone()
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module.weight.requires_grad
        and name.rpartition(".")[2] in TARGETS  # not the head, nor an adapter's own matrices
    }


@torch.no_grad()
def change(model: Any, before: dict[str, Tensor]) -> dict[str, float]:
    """Means over the trained matrices.

    Returns:
        "change": largest singular value of the change over that of the weight before; "rank": the
        change's stable rank, its squared Frobenius norm over its squared largest singular value.
    """
    sizes, ranks = [], []
    for weight, delta in _pairs(model, before):
        largest = torch.linalg.matrix_norm(delta, 2)
        sizes.append(float(largest / torch.linalg.matrix_norm(weight, 2)))
        if largest > 0:
            ranks.append(float((delta.norm() / largest) ** 2))
    return {"change": round(mean(sizes), 5), "rank": round(mean(ranks), 2) if ranks else 0.0}


def _pairs(model: Any, before: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Weight before training and its change, in fp32, of every trained matrix."""
    for name, module in model.named_modules():
        if isinstance(module, LiftLinear):
            weight = module.weight_tiles.rows(0, module.out_features).float()
            yield weight, module.effective.rows(0, module.out_features) - weight
        elif hasattr(module, "get_delta_weight") and hasattr(module, "base_layer"):  # PEFT's
            base = frozen_weight(module.base_layer)
            yield base.rows(0, base.shape[0]).float(), _dense(module.get_delta_weight("default"))
        elif name in before:
            yield before[name], module.weight.detach() - before[name]


def _dense(delta: Tensor) -> Tensor:
    return (delta.to_dense() if delta.is_sparse else delta).float()
