"""Streaming the frozen weights of a model's blocks from the host's memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from leanlift.errors import UserError
from leanlift.format import size
from leanlift.layers import FrozenLinear, LiftEmbedding
from leanlift.model.blocks import block_lists
from leanlift.model.state import lift_state, lifted
from leanlift.streaming import Block, Place, Pool, nbytes_of, streamed
from leanlift.weights import bnb
from leanlift.weights.quantized import weight_places
from leanlift.weights.stacks import QuantizedStack


def stream_base(model: nn.Module, device: torch.device | None = None) -> Pool:
    """Keep the frozen weights of an attached model's blocks in the host's memory, and bring each
    block to the device when it computes.

    What computes is the same, to the bit. Indices, offsets, norms, biases, embedding and head stay
    where they are.

    Args:
        model: attached.
        device: where the model computes; None: where its offsets are.

    Returns:
        What brings the blocks.

    Raises:
        UserError: nothing is attached, a model whose blocks cannot be found, or too little memory
            of the host's.
    """
    model = lifted(model)
    state = lift_state(model)
    if state.pool is not None:
        return state.pool
    blocks = layers_of_blocks(model)
    device = device or next(p.device for p in model.parameters() if p.requires_grad)
    _check_room(blocks)
    made = [Block([p for layer in layers for p in _places(layer)], device.type == "cuda")
            for layers in blocks]  # fmt: skip
    pool = Pool(made, device)
    for number, layers in enumerate(blocks):
        for layer in layers:
            for holder, name in bnb.tables_of(layer.base):
                setattr(holder, name, getattr(holder, name).to(device))
            layer.weight_tiles = _in_pool(layer.weight_tiles, pool, number)
    state.pool = pool
    return pool


def layers_of_blocks(model: nn.Module) -> list[list[FrozenLinear]]:
    """The layers of ours in each block of the language model, in order; each once.

    Raises:
        UserError: there are no blocks with such layers.
    """
    seen: set[int] = set()
    blocks: list[list[FrozenLinear]] = []
    for path in block_lists(model):
        listed: Any = model.get_submodule(path)
        for block in listed:
            layers = [
                module
                for module in block.modules()
                if isinstance(module, FrozenLinear)
                and not isinstance(module, LiftEmbedding)
                and id(module) not in seen
            ]
            seen.update(map(id, layers))
            if layers:
                blocks.append(layers)
    if not blocks:
        raise UserError(
            f"the blocks of this {type(model).__name__} cannot be found, so its base cannot be "
            "streamed: leave out stream_base."
        )
    return blocks


def _places(layer: FrozenLinear) -> list[Place]:
    return [Place(holder, name) for holder, name in weight_places(layer.base)]


def _in_pool(weight: Any, pool: Pool, block: int) -> Any:
    if isinstance(weight, QuantizedStack):
        return replace(weight, held=streamed(weight.held, pool, block))
    return streamed(weight, pool, block)


def _check_room(blocks: list[list[FrozenLinear]]) -> None:
    """Refuse what the host's memory cannot hold."""
    needed = sum(
        nbytes_of(place.tensor.nbytes for place in _places(layer) if place.tensor.is_cuda)
        for layers in blocks
        for layer in layers
    )
    free = free_host_bytes()
    if free is not None and needed > free:
        raise UserError(
            f"a streamed base of {size(needed)} does not fit the host's memory, of which "
            f"{size(free)} are free: leave out stream_base."
        )


def free_host_bytes() -> int | None:
    """What the host's memory has left; None: it does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
