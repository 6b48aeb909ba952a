"""Merging in memory: into the model's weights for good, or for a while.

For good (`merge_and_unload`): every layer of ours becomes the kind of module that stock
transformers has there, with the effective weight in 16 or 32 bits, one matrix at a time. A
quantized base becomes as large as it was before it was quantized: for models that are small, or a
machine that is large; `merge_adapter` streams what does not fit.

For a while (`hold_merged`): each layer keeps its effective weight beside its base, so that a
forward pass makes none, as for generating much between two steps. `drop_merged` frees it, and the
layers are to the bit what they were. Where the adapter changes meanwhile, by a refresh, a scale or
for another one, a layer lets go of what it keeps, and computes as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from leanlift.errors import UserError
from leanlift.layers import FrozenLinear, LiftEmbedding, TiedHead
from leanlift.layers.embedding import FrozenEmbedding
from leanlift.layers.frozen import dense
from leanlift.layers.frozen_head import FrozenHead
from leanlift.layers.fused_glu import use_stock_glu
from leanlift.model.base import base_dtype
from leanlift.model.stacks import put_part
from leanlift.model.state import every_layer, lift_state, lifted
from leanlift.model.strangers import unguard
from leanlift.model.surgery import outer_modules
from leanlift.tiles import RowTiles, is_stack, part_shape, parts_of
from leanlift.weights.kinds import is_stored_turned
from leanlift.weights.stacks import ExpertStack


@torch.no_grad()
def merge_and_unload(model: nn.Module, dtype: Any = None, progress: bool = False) -> Any:
    """Merge the adapter into the weights, and leave a stock model, in place.

    Args:
        model: an attached model.
        dtype: of the merged weights; None: that in which the base was loaded.
        progress: whether to show a bar over the matrices.

    Returns:
        The model as transformers made it, with nothing of leanlift.

    Raises:
        UserError: embedding or head are held in INT8 or the dtype is none of floats; the model is
            unchanged then.
    """
    model = lifted(model)
    lift_state(model)
    own = base_dtype(model)
    dtype = _dtype(dtype, own)
    drop_merged(model)
    held = [n for n, m in model.named_modules() if isinstance(m, FrozenEmbedding | FrozenHead)]
    if held:
        raise UserError(
            f"{held[0]} is held in INT8 or on the CPU, which no stock module has in its place: "
            "save the adapter, and merge it with merge_adapter(adapter, output)."
        )
    layers = [(n, m) for n, m in outer_modules(model) if isinstance(m, FrozenLinear | TiedHead)]
    for _ in tqdm(range(len(layers)), "Merging", unit="matrix", disable=not progress):
        name, layer = layers.pop(0)  # so that no two of them are there twice
        put_part(model, name, _stock(layer, dtype))
        del layer
    use_stock_glu(model)
    unguard(model)
    for mark in ("leanlift", "print_trainable_parameters"):
        vars(model).pop(mark, None)
    for parameter in model.parameters():
        if parameter.dtype == own:  # what is kept in another on purpose stays, and every buffer
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def hold_merged(model: nn.Module, dtype: Any = None) -> int:
    """Keep the effective weights of all trained layers beside their bases, in a dtype, until
    `drop_merged`; nothing is trained meanwhile.

    Returns:
        The bytes that they take.

    Raises:
        UserError: the dtype is none of floats.
    """
    dtype, taken = _dtype(dtype, base_dtype(lifted(model))), 0
    lift_state(model).holds_merged = True
    with torch.no_grad():
        for layer in every_layer(model).values():
            if not isinstance(layer, LiftEmbedding):
                layer.merged = dense(layer.effective, dtype)
                taken += layer.merged.nbytes
    return taken


def drop_merged(model: nn.Module) -> None:
    """Free what `hold_merged` made."""
    lift_state(model).holds_merged = False
    for layer in every_layer(model).values():
        layer.merged = None


def _stock(layer: Any, dtype: torch.dtype) -> nn.Module:
    """What stock transformers has in the place of a layer of ours, merged."""
    if isinstance(layer, TiedHead):
        frozen: nn.Module = layer.frozen
        return frozen
    if isinstance(layer, LiftEmbedding):
        lookup: Any = layer.lookup
        if layer.index.count:
            lookup.weight.data[layer.tokens] = layer.token_rows(lookup.weight.dtype)
        return lookup
    tiles: RowTiles = layer.effective if hasattr(layer, "effective") else layer.weight_tiles
    weight, training = dense(tiles, dtype), layer.training
    if is_stack(layer.weight_tiles):
        shape = parts_of(layer.weight_tiles), *part_shape(layer.weight_tiles)
        return ExpertStack(nn.Parameter(weight.view(shape), requires_grad=False))
    return _linear(layer.base, weight, layer.bias).train(training)


def _linear(base: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A Linear of the base's kind with another weight [m, n]."""
    m, n = weight.shape
    source = getattr(base, "source_cls", None)
    turned = is_stored_turned(base)
    quantized = not base.weight.dtype.is_floating_point
    linear: Any = base
    if quantized and turned:
        assert source is not None
        linear = source(m, n)
    elif quantized:
        linear = nn.Linear(n, m, bias=bias is not None, device="meta")
    weight = weight.T.contiguous() if turned else weight
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    return linear  # type: ignore[no-any-return]


def _dtype(wanted: Any, own: torch.dtype) -> torch.dtype:
    found = own if wanted is None else wanted
    found = getattr(torch, found, None) if isinstance(found, str) else found
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"expected a dtype such as float16 or bfloat16, got {wanted!r:.60}.")
    return found
