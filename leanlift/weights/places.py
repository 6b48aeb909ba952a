"""Where the tensors of a frozen weight are: all, and as attributes that others can be put at."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from leanlift.weights import bnb
from leanlift.weights.quantized import is_quantized


def weight_tensors(module: nn.Module) -> list[Tensor]:
    """Every tensor in which a Linear of any supported kind keeps its weight."""
    if is_quantized(module):
        return bnb.tensors_of(module)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return [weight.data]


def weight_places(module: nn.Module) -> list[tuple[Any, str]]:
    """Where the tensors in which a Linear of any supported kind keeps its weight are read from, but
    for lookup tables: objects and names of attributes."""
    return bnb.places_of(module) if is_quantized(module) else [(module.weight, "data")]


def weight_tables(module: nn.Module) -> list[tuple[Any, str]]:
    """Where the lookup tables of such a weight are read from."""
    return bnb.tables_of(module)
