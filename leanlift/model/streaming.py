"""Streaming the frozen weights of a model's blocks from the host's memory.

A model is streamed before it is attached, so that entries are chosen from weights that come by as
they are read, or afterwards. What is marked are the modules that hold the weights; whoever asks for
the weight of one gets what brings it (`weights.frozen_weight`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from leanlift.errors import UserError
from leanlift.format import size
from leanlift.layers import FrozenLinear, LiftEmbedding, LiftLinear
from leanlift.model.blocks import block_lists
from leanlift.model.reading import read_by_parent
from leanlift.model.state import lift_state, lifted
from leanlift.model.surgery import layers_over, outer_modules, replace_modules
from leanlift.streaming import STREAMED, Block, Place, Pool, streamed
from leanlift.weights.kinds import is_dense_linear
from leanlift.weights.places import weight_places, weight_tables
from leanlift.weights.quantized import FrozenWeight, is_quantized
from leanlift.weights.stacks import ExpertStack, QuantizedStack, target_weight

POOL = "_leanlift_pool"
"""The attribute of a model that has what brings its blocks."""


def stream_base(
    model: nn.Module, device: torch.device, state: bool = False, waiting: Iterable[nn.Module] = ()
) -> Pool:
    """Keep the frozen weights of a model's blocks in the host's memory, and bring each block to the
    device when it is read; all else goes to the device.

    What is computed is the same, to the bit, as with all of them on the device.

    Args:
        model: stock or attached; wherever it is, as loaded onto the CPU.
        device: where it computes.
        state: whether what will be learned in a block comes with it (`stream_state`): positions,
            offsets, retired entries and moments. Of a stock model.
        waiting: modules that stay on the host, since they get another form first.

    Returns:
        What brings the blocks.

    Raises:
        UserError: a model whose blocks cannot be found, or memory of the host's that cannot be had.
    """
    model = lifted(model)
    known = pool_of(model)
    if known is not None:
        return known
    if state and any(isinstance(module, LiftLinear) for module in model.modules()):
        raise UserError("state=True streams what will be learned: call it before get_lift_model.")
    blocks = [[*map(holder_of, each)] for each in layers_by_block(model)]
    pool = Pool([_block(holders, device) for holders in blocks], device, state)
    for number, holders in enumerate(blocks):
        for each in holders:
            setattr(each.weight, STREAMED, (pool, number))
    for layer in model.modules():
        where = getattr(getattr(layer, "base", None), "weight", None)
        if isinstance(layer, FrozenLinear) and hasattr(where, STREAMED):
            layer.weight_tiles = _in_pool(layer.weight_tiles, *getattr(where, STREAMED))
    if hasattr(model, "leanlift"):
        over_the_rest = layers_over(plain_in_pool(model), {}, lift_state(model).workspace)
        replace_modules(model, over_the_rest)
    holder: Any = model
    setattr(holder, POOL, pool)
    if getattr(model, "hf_device_map", None):  # says where it was loaded, and is asked where it is
        holder.hf_device_map = {"": device.index or 0 if device.type == "cuda" else device.type}
    _move_the_rest(model, blocks, device, waiting)
    return pool


def pool_of(model: nn.Module) -> Pool | None:
    """What brings a model's blocks; None: they are where the model is."""
    found: Pool | None = getattr(lifted(model), POOL, None)
    return found


def computes_on(model: nn.Module) -> torch.device | None:
    """Where a model computes whose blocks are brought; None: where it is."""
    pool = pool_of(model)
    return None if pool is None else pool.device


def layers_by_block(model: nn.Module) -> list[list[Any]]:
    """What has a frozen weight in each block of the language model, in order: layers of ours, and
    before they are put in Linears and stacks of experts. Each weight is there once, under its
    first block. A Linear whose weight its parent computes with itself is not: nothing would bring
    it.

    Raises:
        UserError: there are no blocks with such modules.
    """
    blocks: dict[str, list[Any]] = {}
    seen: set[int] = set()
    names = dict(model.named_modules())
    inside = tuple(f"{path}." for path in block_lists(model))
    for name, module in outer_modules(model):
        path = next((path for path in inside if name.startswith(path)), None)
        weight = id(holder_of(module).weight) if has_a_weight(module) else None
        if path is None or weight is None or weight in seen or read_by_parent(names, name):
            continue
        number = name.removeprefix(path).partition(".")[0]
        blocks.setdefault(path + number, []).append(module)
        seen.add(weight)
    if not blocks:
        raise UserError(
            f"the blocks of this {type(model).__name__} cannot be found, so its base cannot be "
            "streamed: leave out stream_base."
        )
    return list(blocks.values())


def plain_in_pool(model: nn.Module) -> dict[str, FrozenWeight]:
    """The 16- and 32-bit weights that a pool brings, by the names of the Linears and stacks of
    experts that no layer of ours stands for: nothing else would have them brought."""
    return {
        name: target_weight(module, name)
        for name, module in outer_modules(model)
        if (is_dense_linear(module) or isinstance(module, ExpertStack))
        and hasattr(module.weight, STREAMED)
    }


def holder_of(module: Any) -> Any:
    """What holds the weight: a module itself, or what is under a layer of ours."""
    return module.base if isinstance(module, FrozenLinear) else module


def has_a_weight(module: nn.Module) -> bool:
    """Whether a module of a block has a frozen weight that is streamed."""
    ours = isinstance(module, FrozenLinear) and not isinstance(module, LiftEmbedding)
    stock = is_quantized(module) or is_dense_linear(module) or isinstance(module, ExpertStack)
    return ours or (stock and not isinstance(module, FrozenLinear))


def _block(holders: list[Any], device: torch.device) -> Block:
    places = [Place(*place) for holder in holders for place in weight_places(holder)]
    try:
        return Block(places, pin=device.type == "cuda")
    except RuntimeError as error:
        needed = sum(place.tensor.nbytes for place in places)
        raise UserError(
            f"a streamed base needs memory of the host's, pinned, and {size(needed)} for a block "
            "could not be had: free some, or leave out stream_base."
        ) from error


def _in_pool(weight: Any, pool: Pool, block: int) -> Any:
    if isinstance(weight, QuantizedStack):
        return replace(weight, held=cast(Any, streamed(weight.held, pool, block)))
    return streamed(weight, pool, block)


def _move_the_rest(
    model: nn.Module, blocks: list[list[Any]], device: torch.device, waiting: Iterable[nn.Module]
) -> None:
    """Move all of a model to a device but for what its pool brings, and what waits."""
    held = {id(holder.weight) for holders in blocks for holder in holders}
    held |= {id(tensor) for module in waiting for tensor in module.parameters()}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in held and tensor.device != device:
            tensor.data = tensor.data.to(device)
    for holders in blocks:
        for holder in holders:
            for owner, name in weight_tables(holder):
                setattr(owner, name, getattr(owner, name).to(device))
