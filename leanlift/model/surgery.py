"""Putting modules of ours in the place of a model's own: one walk, for every kind of model.

`replace_modules` goes over a model and puts in what `make_layer(name, module)` gives. A model that
trains, one that is only computed with and one that is planned over fake tensors differ in that
argument alone, so a plan cannot drift from what attaches. `layers_over` is the argument of all
three: our layers over frozen weights, which hold numbers in two of them and nothing in the third.

Modules inside a layer of ours, such as the Linear that holds its weight, are no part of the walk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from leanlift.layers import FrozenLinear, LiftLinear, Workspace
from leanlift.layers.embedding import FrozenEmbedding
from leanlift.layers.experts import FrozenExperts, LiftExperts
from leanlift.layers.fused_glu import use_fused_glu
from leanlift.layers.lm_head import FrozenHead
from leanlift.model.embeddings import Hold, quantize_embeddings
from leanlift.model.resize_embeddings import grow_embedding
from leanlift.model.stacks import named_parts, put_part
from leanlift.sparse import SegmentedIndex
from leanlift.tiles import is_stack
from leanlift.weights.quantized import FrozenWeight, WeightFormat, frozen_weight, is_quantized

OURS = (FrozenLinear, FrozenEmbedding, FrozenHead)

MakeLayer = Callable[[str, nn.Module], nn.Module | None]
"""What to put in the place of a module, by its name; None or the module itself: it stays."""


def outer_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model by name, its stacks of experts among them, without those inside layers
    of ours, in model order."""
    inside = None
    for name, module in named_parts(model).items():
        if inside is not None and name.startswith(inside):
            continue
        yield name, module
        inside = f"{name}." if isinstance(module, OURS) else None


def replace_modules(model: nn.Module, make_layer: MakeLayer) -> dict[str, nn.Module]:
    """Put in what `make_layer` gives, in place. Where it raises, nothing has been replaced.

    Returns:
        The modules that were replaced by name, for a Parameter the stack that it was seen as:
        `replace_modules(model, lambda name, _: replaced.get(name))` puts them back.
    """
    found = [(name, module, make_layer(name, module)) for name, module in outer_modules(model)]
    replaced = {}
    for name, module, layer in found:
        if layer is not None and layer is not module:
            put_part(model, name, layer.train(module.training))
            replaced[name] = module
    return replaced


def layers_over(
    weights: Mapping[str, FrozenWeight],
    indices: Mapping[str, SegmentedIndex],
    workspace: Workspace,
    values_dtype: torch.dtype = torch.float32,
) -> MakeLayer:
    """What puts our layers over `weights`: LiftLinears (LiftExperts over stacks) that train the
    positions `indices`, and FrozenLinears where there are none. A layer that is there already and
    does the same stays.

    Args:
        weights: frozen weights by the names of their modules.
        indices: positions to train, on the device of the weight.
        workspace: shared by all layers of a model.
        values_dtype: of the offsets.
    """

    def make_layer(name: str, module: nn.Module) -> nn.Module | None:
        weight, index = weights.get(name), indices.get(name)
        if weight is None:
            return None
        frozen, trained = FrozenLinear, LiftLinear
        if is_stack(weight):
            frozen, trained = FrozenExperts, LiftExperts
        if index is None:
            if isinstance(module, FrozenLinear) and type(module) is frozen:
                module.workspace = workspace
                return module
            return frozen(weight.module, weight, workspace)
        if isinstance(module, LiftLinear):
            there = module.index.count, module.values.dtype
            if there == (index.count, values_dtype):
                return module
        return trained(weight.module, weight, index, workspace, values_dtype)

    return make_layer


def operate(
    model: nn.Module,
    make_layer: MakeLayer,
    hold_ends: Hold | None = None,
    embedding_rows: int | None = None,
) -> dict[str, WeightFormat]:
    """All that is done to a stock model, or to a planned one, before it trains.

    Args:
        model: in which no parameter is trained afterwards but those of the new layers.
        make_layer: as for `replace_modules`.
        hold_ends: how the embedding and the head are held in INT8; None: they stay.
        embedding_rows: rows that the embedding gets; None: it has enough.

    Returns:
        The formats of embedding and head by module name, where they are quantized.
    """
    model.requires_grad_(False)
    replace_modules(model, make_layer)
    use_fused_glu(model)
    if embedding_rows is not None:
        grow_embedding(model, embedding_rows)
    return {} if hold_ends is None else quantize_embeddings(model, hold_ends)


def freeze_quantized(model: nn.Module) -> None:
    """Our forward in every quantized Linear of a stock model, so that it differs from the same
    model with an adapter by the adapter alone."""
    weights = {
        name: frozen_weight(module, name)
        for name, module in outer_modules(model)
        if is_quantized(module)
    }
    replace_modules(model, layers_over(weights, {}, Workspace()))
