"""Quantized weights without contents, for planning."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from leanlift.weights import bnb
from leanlift.weights.quantized import Weight4bit, Weight8bit, WeightFormat


def empty_weight(
    shape: tuple[int, int], fmt: WeightFormat, bias: Tensor | None = None
) -> Weight4bit | Weight8bit:
    """A quantized weight of this shape and format with uninitialized storage."""
    if fmt.kind == "int8":
        return Weight8bit(bnb.empty_8bit(shape, bias))
    return Weight4bit(
        bnb.empty_4bit(shape, fmt.kind, fmt.blocksize, fmt.double, fmt.torch_dtype, bias)
    )


def another_empty(weight: Any, bias: Tensor | None) -> Weight4bit | Weight8bit:
    """One more like it, over the same storage."""
    another: Weight4bit | Weight8bit = type(weight)(bnb.another_empty(weight.module, bias))
    return another
