"""Putting modules of ours in the place of a model's own: one walk, for every kind of model.

`replace_modules` goes over a model and puts in what `make_layer(name, module)` gives. A model that
trains, one that is only computed with and one that is planned over fake tensors differ in that
argument alone, so a plan cannot drift from what attaches. `layers_over` is the argument of all
three: our layers over frozen weights, which hold numbers in two of them and nothing in the third.

Modules inside a layer of ours, such as the Linear that holds its weight, are no part of the walk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from leanlift.layers import FrozenLinear, LiftLinear, Workspace
from leanlift.layers.embedding import FrozenEmbedding
from leanlift.layers.experts import FrozenExperts, LiftExperts
from leanlift.layers.frozen_head import FrozenHead
from leanlift.layers.fused_glu import use_fused_glu
from leanlift.layers.kept_norms import use_kept_norms
from leanlift.model.embeddings import Hold, quantize_embeddings
from leanlift.model.reading import read_by_parent
from leanlift.model.resize_embeddings import grow_embedding
from leanlift.model.stacks import named_parts, put_part
from leanlift.sparse import SegmentedIndex
from leanlift.tiles import is_stack
from leanlift.weights.kinds import is_dense_linear, is_turned_linear
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
    paths = _paths_by_weight(model)
    replaced = {}
    for name, module, layer in found:
        if layer is not None and layer is not module:
            layer.train(module.training)
            for path in paths.get(_weight_id(module), [name]):
                put_part(model, path, layer)
            replaced[name] = module
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(head, FrozenLinear):
        head.is_head = True
    return replaced


def _paths_by_weight(model: nn.Module) -> dict[int | None, list[str]]:
    """Where each weight of a Linear, or under a layer of ours, is used: blocks that a model goes
    through several times have it in several places, and one layer stands in all of them."""
    paths: dict[int | None, list[str]] = {}
    inside = None
    for name, module in model.named_modules(remove_duplicate=False):
        if inside is not None and name.startswith(inside):
            continue
        if _weight_id(module) is not None:
            paths.setdefault(_weight_id(module), []).append(name)
        inside = f"{name}." if isinstance(module, OURS) else None
    return paths


def _weight_id(module: nn.Module) -> int | None:
    """What tells the weight of a Linear, or of the one under a layer of ours, from others."""
    holder: Any = module.base if isinstance(module, FrozenLinear) else module
    linear = isinstance(holder, nn.Linear) or is_turned_linear(holder)
    return id(holder.weight) if linear else None


def layers_over(
    weights: Mapping[str, FrozenWeight],
    indices: Mapping[str, SegmentedIndex],
    workspace: Workspace,
    values_dtype: torch.dtype = torch.float32,
) -> MakeLayer:
    """What puts our layers over `weights`: LiftLinears (LiftExperts over stacks) that train the
    positions `indices`, and FrozenLinears where there are none. A layer that is there already and
    does the same stays, and one in which other adapters have learned something.

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
            if isinstance(module, LiftLinear) and module.shelf:
                return module
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
    if embedding_rows is not None:
        grow_embedding(model, embedding_rows)
    # while nothing else is there yet: for a moment an end has two forms
    formats = {} if hold_ends is None else quantize_embeddings(model, hold_ends)
    replace_modules(model, make_layer)
    replace_modules(model, _dense_where_read(model))
    use_fused_glu(model)
    use_kept_norms(model)
    return formats


def _dense_where_read(model: nn.Module) -> MakeLayer:
    """What puts plain Linears in the place of frozen ones whose weight their parent takes and
    computes with itself, as the scans of Mamba do: it would take packed bytes for numbers."""
    names = dict(model.named_modules())
    dtype = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.float32)

    def make_layer(name: str, module: nn.Module) -> nn.Module | None:
        if type(module) is not FrozenLinear or is_dense_linear(module.base):
            return None
        return dense_linear(module, dtype) if read_by_parent(names, name) else None

    return make_layer


@torch.no_grad()
def dense_linear(layer: FrozenLinear, dtype: torch.dtype) -> nn.Linear:
    """The frozen Linear that a layer stands for, with its dequantized weight in a dtype."""
    m, n = layer.weight_tiles.shape
    linear = nn.Linear(n, m, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.weight_tiles.rows(0, m).to(dtype), requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return linear


def freeze_quantized(model: nn.Module) -> None:
    """Our forward in every quantized Linear of a stock model, so that it differs from the same
    model with an adapter by the adapter alone."""
    weights = {
        name: frozen_weight(module, name)
        for name, module in outer_modules(model)
        if is_quantized(module)
    }
    replace_modules(model, layers_over(weights, {}, Workspace()))
