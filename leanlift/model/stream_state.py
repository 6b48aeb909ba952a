"""What is learned in streamed blocks: at rest in the host's memory, brought with each block.

Positions, offsets, retired entries, the moments of `SparseAdamW`, and the sum of the gradients of
earlier micro-batches where a step has several, have the same two buffers'
scheme as the frozen weights that they belong to (`streaming.StatePool`). The optimizer steps on the
device, in the backward pass, while a block is there, so that a run is the same to the bit as one
whose state stays; what it wrote goes back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from leanlift.errors import UserError
from leanlift.layers import FrozenLinear, LiftLinear
from leanlift.model.blocks import block_lists
from leanlift.model.state import lifted
from leanlift.model.streaming import has_a_weight, holder_of, pool_of
from leanlift.optim import SparseAdamW
from leanlift.sparse import SegmentedIndex
from leanlift.streaming import STREAMED, BlockState, Pool, StatePool
from leanlift.weights.quantized import FrozenWeight

POOL = "_leanlift_state_pool"
"""The attribute of a model that has what brings the state of its blocks."""


@dataclass
class Learned:
    """What is learned in one block, as it is now.

    Attributes:
        layers: of the block.
        optimizer: whose moments come along; None: nothing has been trained yet.
    """

    layers: list[LiftLinear]
    optimizer: SparseAdamW | None = None

    def __call__(self) -> BlockState:
        """The tensors that it consists of."""
        read: list[Tensor] = []
        written: list[Tensor] = []
        summed: list[Tensor] = []
        for layer in self.layers:
            read += _tensors(layer.index)
            written.append(layer.values)
            if layer.gradient_sum is not None:
                summed.append(layer.gradient_sum)
            if layer.retired_index is not None and layer.retired_values is not None:
                read += [*_tensors(layer.retired_index), layer.retired_values]
            if self.optimizer is not None:
                written += self.optimizer.moments_of(layer.values)
        return BlockState(read, written, summed)


def _tensors(index: SegmentedIndex) -> list[Tensor]:
    """Those of an index that are on a device."""
    return [index.columns, index.counts, index.ends]


def at_rest(weight: FrozenWeight, index: SegmentedIndex) -> SegmentedIndex:
    """Positions of a weight where they lie between two passes: on the host, if they shall come with
    its block."""
    pool = _base_pool(weight.module)
    return index if pool is None or not pool.with_state else index.to(torch.device("cpu"))


def stream_state(model: nn.Module) -> StatePool | None:
    """Let what is learned in the blocks of a model come with them, where it was streamed so
    (`stream_base(..., state=True)`); None: it was not.

    Raises:
        UserError: memory of the host's that cannot be had.
    """
    model = lifted(model)
    base = pool_of(model)
    if base is None or not base.with_state:
        return None
    check_used_once(model)
    blocks: dict[int, list[LiftLinear]] = {}
    for layer in _layers(model):
        number = getattr(layer.base.weight, STREAMED)[1]
        blocks.setdefault(number, []).append(layer)
    states = [Learned(layers) for _, layers in sorted(blocks.items())]
    try:
        pool = StatePool(states, base.device)
    except RuntimeError as error:
        raise UserError(
            "streamed state needs memory of the host's, pinned, which could not be had: free some, "
            "or leave out stream_state."
        ) from error
    for number, state in enumerate(states):
        for layer in state.layers:
            layer.brought_by = pool, number
    holder: Any = model
    setattr(holder, POOL, pool)
    return pool


def check_used_once(model: nn.Module) -> None:
    """Refuse blocks that a model goes through several times in a pass: they would come in between,
    and be updated after each.

    Raises:
        UserError: there is one.
    """
    used: set[int] = set()
    inside: str | None = None
    blocks = tuple(f"{path}." for path in block_lists(model))
    for name, module in model.named_modules(remove_duplicate=False):
        if not name.startswith(blocks) or not has_a_weight(module):
            continue
        if inside is not None and name.startswith(inside):
            continue
        inside = f"{name}." if isinstance(module, FrozenLinear) else None
        weight = id(holder_of(module).weight)
        if weight not in used:
            used.add(weight)
            continue
        raise UserError(
            f"this {type(model).__name__} goes through the same block several times, whose state "
            "cannot come and go with it: leave out stream_state."
        )


def _layers(model: nn.Module) -> Iterator[LiftLinear]:
    for layer in model.modules():
        trains = isinstance(layer, LiftLinear) and layer.index.count
        if trains and _base_pool(layer.base) is not None:
            yield cast(LiftLinear, layer)


def _base_pool(module: Any) -> Pool | None:
    where = getattr(module.weight, STREAMED, None)
    return None if where is None else where[0]


def state_pool_of(model: nn.Module) -> StatePool | None:
    """What brings the state of a model's blocks; None: it is where the model is."""
    found: StatePool | None = getattr(lifted(model), POOL, None)
    return found


def stream_moments(model: nn.Module, optimizer: SparseAdamW, accumulate: bool = False) -> None:
    """Let an optimizer's moments come with the blocks whose values it trains.

    Args:
        accumulate: whether a step has several micro-batches, whose gradients are added up in sums
            that come along too.
    """
    pool = state_pool_of(model)
    for state in [] if pool is None else pool.states:
        assert isinstance(state, Learned)
        state.optimizer = optimizer
        for layer in state.layers:
            optimizer.reserve(layer.values)
            layer.gradient_sum = torch.zeros_like(layer.values.data) if accumulate else None
    let_rest(model)


def let_rest(model: nn.Module) -> None:
    """Between two passes: let all state that is streamed be on the host."""
    pool = state_pool_of(model)
    if pool is not None:
        pool.rest()


def check_updates_in_backward(model: nn.Module, in_backward: bool) -> None:
    """Refuse streamed state where gradients would wait for a step at the end.

    Raises:
        UserError: they would.
    """
    if state_pool_of(model) is not None and not in_backward:
        raise UserError(
            "streamed state is updated while its block is on the device: train it with "
            "leanlift.LiftTrainer and optim_in_backward=True, or leave out stream_state."
        )
