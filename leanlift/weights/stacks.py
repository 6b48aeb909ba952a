"""The weights of a mixture's experts: one tensor [E, m, n] instead of E Linears.

transformers keeps them as a Parameter of the module that computes with them. `ExpertStack` makes a
module of such a Parameter, so that whatever goes by modules (targets, surgery, fingerprints) meets
experts as it meets Linears; `StackWeight` are its rows, [E * m, n]. bitsandbytes quantizes Linears
alone; `quantized_stack` holds those rows as one quantized matrix, of which an expert is a range.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from leanlift.errors import UserError
from leanlift.ops import EightBit, FourBit
from leanlift.tiles import RowTiles, makes_new_rows
from leanlift.weights.bnb import QUANTIZED_AT_ONCE
from leanlift.weights.quantized import (
    FLOAT_DTYPES,
    FrozenWeight,
    Weight4bit,
    Weight8bit,
    WeightFormat,
    dtype_name,
    frozen_weight,
    in_its_pool,
    requantize,
)


class ExpertStack(nn.Module):
    """Holds a Parameter [E, m, n] of another module, under the name that Linears have for it."""

    bias = None

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


@dataclass(frozen=True)
class StackWeight:
    """The rows of all experts, one expert's after another's; they are views."""

    module: ExpertStack

    @property
    def parts(self) -> int:
        """E."""
        return self.module.weight.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        experts, m, n = self.module.weight.shape
        return experts * m, n

    @property
    def dtype(self) -> torch.dtype:
        return self.module.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.module.weight.device

    @property
    def format(self) -> WeightFormat:
        return WeightFormat("dense", dtype_name(self.dtype))

    def rows(self, start: int, stop: int) -> Tensor:
        return self.module.weight.detach().flatten(0, 1)[start:stop]


@dataclass(frozen=True)
class QuantizedStack:
    """The rows of all experts, dequantized from one matrix that holds them.

    Attributes:
        held: the matrix.
        parts: E.
        computes_in: the dtype in which the stack was loaded, and its family computes with it.
    """

    held: Weight4bit | Weight8bit
    parts: int
    computes_in: torch.dtype

    @property
    def module(self) -> nn.Module:
        """What holds the codes."""
        return self.held.module

    @property
    def shape(self) -> tuple[int, int]:
        return self.held.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.held.dtype

    @property
    def device(self) -> torch.device:
        return self.held.device

    @property
    def format(self) -> WeightFormat:
        return self.held.format

    @property
    def fresh(self) -> bool:
        """Whether rows are new tensors at every call."""
        return makes_new_rows(self.held)

    def rows(self, start: int, stop: int) -> Tensor:
        return self.held.rows(start, stop)

    def stored(self) -> FourBit | EightBit:
        """The codes and their scales, for kernels that dequantize themselves."""
        return self.held.stored()


def quantized_stack(
    rows: RowTiles, parts: int, fmt: WeightFormat, device: torch.device | None = None
) -> QuantizedStack:
    """Quantize experts as bitsandbytes would Linears, by row tiles.

    Args:
        rows: of all experts, [E * m, n], in the dtype in which their family computes.
        parts: E.
        fmt: 4 bits or INT8.
        device: where they go; None: where they are.
    """
    held = requantize(rows, fmt, device or rows.device)
    assert isinstance(held, Weight4bit | Weight8bit)
    return QuantizedStack(held, parts, rows.dtype)


def quantizing_nbytes(shape: tuple[int, int], fmt: WeightFormat) -> int:
    """Bytes of tensors that `quantized_stack` takes beside what it makes: a tile in four forms of
    at most fp32, and with double quantization all scales, and what they are off their mean by."""
    m, n = shape
    tiles = 4 * 4 * min(QUANTIZED_AT_ONCE, m * n)
    return tiles + (2 * 4 * -(-m * n // fmt.blocksize) if fmt.double else 0)


def target_weight(module: nn.Module, name: str) -> FrozenWeight:
    """The weight of a Linear of any supported kind, or of a stack of experts.

    Raises:
        UserError: it is neither, or cannot be read; names it and says why.
    """
    if not isinstance(module, ExpertStack):
        return frozen_weight(module, name)
    weight = module.weight
    if weight.device.type == "meta":
        raise UserError(
            f"{name} has no weights in memory (it is on the meta device or offloaded): load the "
            "whole model onto one device."
        )
    if weight.dtype not in FLOAT_DTYPES or is_traceable_wrapper_subclass(weight):
        raise UserError(
            f"{name} holds experts as {type(weight.data).__name__} of {dtype_name(weight.dtype)}; "
            "expected float32, bfloat16 or float16: load the 16-bit checkpoint."
        )
    return in_its_pool(StackWeight(module), module)
