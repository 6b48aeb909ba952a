"""Blocks that are not computed again in the backward pass, of a model that checkpoints its blocks.

A block that keeps its activations costs their bytes, and saves its second forward pass. The last
ones are kept: the backward pass comes to them first, so theirs are gone before the first block is
computed again, and no peak has both. What is computed is the same, to the bit.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from leanlift.errors import UserError
from leanlift.model.blocks import block_lists
from leanlift.model.state import lifted

SWITCH = "gradient_checkpointing"
"""The attribute of a block that says whether it is computed again."""

HANDLES = "_leanlift_kept_blocks"
"""The attribute of a model that has the hooks of its kept blocks."""


def keep_last_blocks(model: nn.Module, count: int, offloading: bool = False) -> None:
    """Let the last `count` blocks keep their activations, whatever enables checkpointing later;
    0: take that back, for whoever enables it the next time.

    Args:
        model: stock or attached, its checkpointing enabled.
        count: blocks.
        offloading: whether saved tensors are moved to the host's memory. Those of kept blocks are
            not: to bring them back takes about as long as to compute them.

    Raises:
        UserError: it has fewer blocks that transformers checkpoints one by one.
    """
    holder: Any = lifted(model)
    for handle in getattr(holder, HANDLES, ()):
        handle.remove()
    setattr(holder, HANDLES, [])
    if not count:
        return
    check_kept_blocks(holder, count)
    for block in recomputed_blocks(holder)[-count:]:
        _keep(block)
        getattr(holder, HANDLES).append(block.register_forward_pre_hook(_keep))
        if offloading:
            getattr(holder, HANDLES).extend(_Staying().hooked(block))


def check_kept_blocks(model: nn.Module, count: int) -> None:
    """Refuse to keep more blocks than there are.

    Raises:
        UserError: says how many there are.
    """
    found = len(recomputed_blocks(model))
    if count <= found:
        return
    name = type(model).__name__
    if not found:
        raise UserError(
            f"this {name} has no blocks that transformers checkpoints one by one, so kept_blocks "
            "cannot keep some of them: leave it out."
        )
    raise UserError(
        f"kept_blocks={count} are more than the {found} blocks of this {name}: to keep all, set "
        "gradient_checkpointing=false and leave kept_blocks out."
    )


def recomputed_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of the language model that checkpointing computes again, each for itself: where
    transformers does so, each has a switch of its own."""
    lists: list[Any] = [model.get_submodule(path) for path in block_lists(model)]
    return [b for blocks in lists for b in blocks if hasattr(b, SWITCH)]


def _keep(block: Any, args: Any = None) -> None:
    """Before each forward pass: some trainers disable checkpointing while they generate, and then
    enable it for all blocks."""
    setattr(block, SWITCH, False)


class _Staying:
    """What autograd saves in a block stays where it is, whatever moves it elsewhere."""

    def __init__(self) -> None:
        self._inside: list[AbstractContextManager[Any]] = []

    def hooked(self, block: nn.Module) -> list[Any]:
        """Hooks around the block's forward pass."""
        return [
            block.register_forward_pre_hook(self._enter),
            block.register_forward_hook(self._leave, always_call=True),
        ]

    def _enter(self, *_: Any) -> None:
        inside = torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)
        inside.__enter__()
        self._inside.append(inside)

    def _leave(self, *_: Any) -> None:
        if self._inside:
            self._inside.pop().__exit__(None, None, None)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
