"""Learning rates that go with the size of a matrix's weights.

Adam moves every entry by about its learning rate a step, whatever the matrix: that is much for one
whose weights are small. With rates in proportion to the root mean square of the weights, over the
geometric mean of all matrices, each moves by the same share of its size. On the weights that were
measured, more of what the base could do is kept where as much is learned
(`benchmarks/quality/real`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from leanlift.layers.frozen import TILE_BYTES
from leanlift.model import lift_layers
from leanlift.tiles import RowTiles, row_ranges, tile_rows


def rate_factors(model: nn.Module) -> dict[str, float]:
    """By the name of a layer, what its learning rate is multiplied by; their geometric mean is 1. A
    matrix of zeros has the factor 1.

    Args:
        model: attached; the frozen weights count, without what was learned.
    """
    sizes = {name: _size(layer.weight_tiles) for name, layer in lift_layers(model).items()}
    logs = [math.log(size) for size in sizes.values() if size]
    middle = math.exp(sum(logs) / max(1, len(logs)))
    return {name: size / middle if size else 1.0 for name, size in sizes.items()}


def scale_rates(optimizer: Any, model: nn.Module) -> None:
    """Give every layer's values a group of their own, with a learning rate for the size of their
    matrix. The first group has no parameters: its rate is the one that was asked for, which
    trainers log.

    Args:
        optimizer: any of torch's kind, before its schedule is made.
        model: attached.
    """
    factors, layers = rate_factors(model), lift_layers(model)
    scaled = {id(layers[name].values): factor for name, factor in factors.items()}
    groups, optimizer.param_groups = optimizer.param_groups, []
    for group in groups:
        rest = [p for p in group["params"] if id(p) not in scaled]
        optimizer.add_param_group({**group, "params": rest})
    for group in groups:
        for parameter in group["params"]:
            if id(parameter) in scaled:
                rate = group["lr"] * scaled[id(parameter)]
                optimizer.add_param_group({**group, "params": [parameter], "lr": rate})


def _size(weight: RowTiles) -> float:
    """The root mean square of a matrix, in fp64."""
    m, n = weight.shape
    total = torch.zeros((), dtype=torch.float64)
    for start, stop in row_ranges(m, tile_rows(n, 4, TILE_BYTES)):
        norm = torch.linalg.vector_norm(weight.rows(start, stop), dtype=torch.float64)
        total += norm.cpu().square()
    return math.sqrt(float(total) / (m * n))
