"""Quantized weights without contents, laid out as bitsandbytes would, for planning."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes.functional as F
import torch
from torch import Tensor, nn

from leanlift.weights.bnb.moments import MOMENT_BLOCK


class EmptyLinear(nn.Module):
    """Holds uninitialized storage laid out as bitsandbytes would a quantized weight.

    For planning under fake tensors, where bitsandbytes' own parameters cannot be made: they are
    tensor subclasses, and so are fake tensors.
    """

    def __init__(self, weight: Any, bias: Tensor | None) -> None:
        super().__init__()
        self.__dict__["weight"] = weight
        self.__dict__["bias"] = bias


class _Storage:
    """What a quantized weight has besides being a tensor."""

    data: Tensor
    dtype: torch.dtype
    quant_state: Any = None
    CB: Tensor | None = None
    SCB: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.data.device


def empty_4bit(
    shape: tuple[int, int],
    kind: str,
    blocksize: int,
    double: bool,
    dtype: torch.dtype,
    bias: Tensor | None,
) -> nn.Module:
    """A 4-bit weight of this shape, as `Weight4bit` reads it."""
    numel = shape[0] * shape[1]
    blocks = -(-numel // blocksize)
    held = _Storage()
    held.data = torch.empty(-(-numel // 2), 1, dtype=torch.uint8)
    held.dtype = torch.uint8
    nested = None
    if double:
        nested = F.QuantState(
            absmax=torch.empty(-(-blocks // MOMENT_BLOCK)),
            code=torch.empty(256),
            blocksize=MOMENT_BLOCK,
            dtype=torch.float32,
        )
    held.quant_state = F.QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8 if double else torch.float32),
        shape=torch.Size(shape),
        dtype=dtype,
        blocksize=blocksize,
        quant_type=kind,
        code=torch.empty(16),
        offset=torch.empty(()) if double else None,
        state2=nested,
    )
    return EmptyLinear(held, bias)


def empty_8bit(shape: tuple[int, int], bias: Tensor | None) -> nn.Module:
    """An INT8 weight of this shape, as `Weight8bit` reads it."""
    held = _Storage()
    held.data = held.CB = torch.empty(shape, dtype=torch.int8)
    held.dtype = torch.int8
    held.SCB = torch.empty(shape[0])
    return EmptyLinear(held, bias)


def another_empty(linear: nn.Module, bias: Tensor | None) -> nn.Module:
    """One more like it, over the same storage, which nobody reads."""
    return EmptyLinear(copy.copy(linear.weight), bias)
