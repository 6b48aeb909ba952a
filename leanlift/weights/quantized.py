"""Frozen base weights as RowTiles.

Whatever stock transformers loaded a Linear as, `frozen_weight(module)` gives its dequantized
rows: `bnb.nn.Linear4bit` (NF4 or FP4, double quantization or not, any block size),
`bnb.nn.Linear8bitLt` (INT8), a plain 16/32-bit `nn.Linear`, or a class that computes the same, also
one that keeps the transpose (Conv1D). Tiles read the module at each call, wherever it has moved.

D(Q) is taken in the dtype in which bitsandbytes itself would dequantize (the dtype that the
weight had when it was quantized; fp32 for INT8), so an untouched leanlift layer computes with
the same weights as the stock one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from leanlift.errors import UserError
from leanlift.ops import EightBit, FourBit, Scales
from leanlift.streaming import STREAMED, streamed
from leanlift.tiles import CastTiles, RowTiles, as_tiles
from leanlift.weights import bnb
from leanlift.weights.kinds import computes_turned, is_dense_linear, is_turned_linear, matrix_of

NESTED_BLOCK = 256
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class WeightFormat:
    """How a frozen weight is stored.

    Attributes:
        kind: "nf4", "fp4", "int8" or "dense".
        dtype: name of the dtype that its rows have, e.g. "bfloat16".
        blocksize: values per scale of a 4-bit weight, else 0.
        double: whether those scales are quantized too.
    """

    kind: str
    dtype: str
    blocksize: int = 0
    double: bool = False

    def __str__(self) -> str:
        if self.kind == "dense":
            return self.dtype
        block = f"/{self.blocksize}" if self.blocksize not in (0, 64) else ""
        return f"{self.kind}{block}{'+double' if self.double else ''}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype that its rows have."""
        return dtype_of(self.dtype)

    @property
    def tables_nbytes(self) -> int:
        """Bytes of the lookup tables that bitsandbytes keeps beside each 4-bit matrix: 16 fp32
        codes, and with double quantization 256 for the scales."""
        if self.kind not in ("nf4", "fp4"):
            return 0
        return 4 * (16 + 256 * self.double)

    def held_nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of all tensors in which a weight of this shape is held."""
        return self.nbytes(shape) + self.tables_nbytes

    def tensor_sizes(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """Bytes of each tensor of such a weight that `places.weight_places` names."""
        numel = shape[0] * shape[1]
        if self.kind == "dense":
            return (numel * self.torch_dtype.itemsize,)
        if self.kind == "int8":
            return numel, 4 * shape[0]
        blocks = -(-numel // self.blocksize)
        nested = (4 * -(-blocks // NESTED_BLOCK),) if self.double else ()
        return -(-numel // 2), blocks if self.double else 4 * blocks, *nested

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of a weight of this shape and its scales, without `tables_nbytes`."""
        return sum(self.tensor_sizes(shape)) + 4 * (self.double and self.kind in ("nf4", "fp4"))


def dtype_of(name: str) -> torch.dtype:
    """torch.float16 from "float16".

    Raises:
        UserError: not one of the three floating dtypes that checkpoints use.
    """
    for dtype in FLOAT_DTYPES:
        if str(dtype) == f"torch.{name}":
            return dtype
    raise UserError(f"expected a dtype among float32, bfloat16 and float16, got {name!r}.")


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without its package: "float16" of torch.float16."""
    return str(dtype).removeprefix("torch.")


class FrozenWeight(RowTiles, Protocol):
    """RowTiles over a module's frozen weight, with the format it is stored in."""

    @property
    def module(self) -> nn.Module:
        """The module that holds the weight."""

    @property
    def format(self) -> WeightFormat:
        """How the weight is stored."""


@dataclass(frozen=True)
class Weight4bit:
    """A `Linear4bit` weight."""

    module: nn.Module
    fresh: ClassVar[bool] = True
    """Rows are new tensors, which whoever asked for them may write to."""

    @property
    def shape(self) -> tuple[int, int]:
        m, n = bnb.state_4bit(self.module).shape
        return m, n

    @property
    def dtype(self) -> torch.dtype:
        return bnb.state_4bit(self.module).dtype

    @property
    def device(self) -> torch.device:
        return bnb.state_4bit(self.module).absmax.device

    @property
    def format(self) -> WeightFormat:
        state = bnb.state_4bit(self.module)
        return WeightFormat(
            state.quant_type, dtype_name(state.dtype), state.blocksize, bool(state.nested)
        )

    def rows(self, start: int, stop: int) -> Tensor:
        n = self.shape[1]
        return bnb.dequantize_4bit_range(self.module, start * n, stop * n).view(stop - start, n)

    def stored(self) -> FourBit:
        """The packed weight and its scales, for kernels that dequantize themselves."""
        packed, absmax, table, blocksize, nested = bnb.parts_4bit(self.module)
        return FourBit(packed, absmax, table, blocksize, Scales(*nested) if nested else None)


@dataclass(frozen=True)
class Weight8bit:
    """A `Linear8bitLt` weight; rows come in fp32."""

    module: nn.Module
    format: WeightFormat = WeightFormat("int8", "float32")
    dtype: torch.dtype = torch.float32

    def _codes(self) -> Tensor:
        state = bnb.state_8bit(self.module)
        assert state is not None
        return state[0]

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self._codes().shape
        return m, n

    @property
    def device(self) -> torch.device:
        return self._codes().device

    def rows(self, start: int, stop: int) -> Tensor:
        return bnb.dequantize_8bit_rows(self.module, start, stop)

    def stored(self) -> EightBit:
        """Codes and scales, for kernels that dequantize themselves."""
        state = bnb.state_8bit(self.module)
        assert state is not None
        return EightBit(*state)


@dataclass(frozen=True)
class WeightDense:
    """A plain `nn.Linear` weight in 16 or 32 bits; rows are views."""

    module: nn.Module

    @property
    def shape(self) -> tuple[int, int]:
        m, n = matrix_of(self.module).shape
        return m, n

    @property
    def dtype(self) -> torch.dtype:
        return matrix_of(self.module).dtype

    @property
    def device(self) -> torch.device:
        return matrix_of(self.module).device

    @property
    def format(self) -> WeightFormat:
        return WeightFormat("dense", dtype_name(self.dtype))

    def rows(self, start: int, stop: int) -> Tensor:
        return matrix_of(self.module)[start:stop]


@dataclass(frozen=True)
class WeightTurned(WeightDense):
    """The transpose [m, n] of a 16/32-bit weight [n, m], as a Conv1D has it; rows are copies."""

    fresh: ClassVar[bool] = True

    def rows(self, start: int, stop: int) -> Tensor:
        return super().rows(start, stop).clone(memory_format=torch.contiguous_format)


def frozen_weight(module: nn.Module, name: str = "this module") -> FrozenWeight:
    """The weight of a Linear of any supported kind as RowTiles, streamed where the module is.

    Raises:
        UserError: the module is no Linear that leanlift can read; names it and says why.
    """
    return in_its_pool(_weight_of(module, name), module)


def in_its_pool(weight: Any, module: nn.Module) -> Any:
    """The weight of a module; where the module is streamed, what brings it to its device."""
    where = getattr(module.weight, STREAMED, None)
    return weight if where is None else streamed(weight, *where)


def _weight_of(module: nn.Module, name: str) -> FrozenWeight:
    parameter = getattr(module, "weight", None)
    if isinstance(parameter, Tensor) and parameter.device.type == "meta":
        raise UserError(
            f"{name} has no weights in memory (it is on the meta device or offloaded): load the "
            "whole model onto one device."
        )
    if isinstance(parameter, Tensor) and is_traceable_wrapper_subclass(parameter):
        raise UserError(
            f"{name} has a weight of type {type(parameter.data).__name__}, which another library "
            "stores in its own way: load the 16-bit checkpoint, or quantize it with bitsandbytes."
        )
    source = getattr(module, "source_cls", nn.Linear)
    if source is not nn.Linear and not computes_turned(source):
        raise UserError(
            f"{name} was a {source.__name__} before it was quantized, which computes otherwise "
            "than a Linear: leave it out with exclude_modules."
        )
    if is_quantized(module) and type(parameter) is nn.Parameter and parameter.is_floating_point():
        raise UserError(
            f"{name} is a {type(module).__name__} with numbers that bitsandbytes did not quantize, "
            "as transformers makes one for a head that the checkpoint has not: load the model with "
            f"BitsAndBytesConfig(..., llm_int8_skip_modules=[{name.rpartition('.')[2]!r}])."
        )
    if bnb.is_linear4bit(module):
        problem = bnb.problem_4bit(module)
        if problem:
            raise UserError(f"{name} is a Linear4bit that cannot be read: {problem}.")
        return _of_its_shape(Weight4bit(module), module, name)
    if bnb.is_linear8bit(module):
        if bnb.state_8bit(module) is None:
            raise UserError(
                f"{name} is a Linear8bitLt that holds no INT8 weight yet: load it with "
                "BitsAndBytesConfig(load_in_8bit=True) and move it to its device first."
            )
        return _of_its_shape(Weight8bit(module), module, name)
    if is_dense_linear(module):
        dtype = module.weight.dtype
        if dtype not in FLOAT_DTYPES:
            raise UserError(
                f"{name} is a Linear with a weight of dtype {dtype}; expected float32, bfloat16, "
                "float16 or a bitsandbytes layer."
            )
        return WeightTurned(module) if is_turned_linear(module) else WeightDense(module)
    raise UserError(
        f"{name} is a {type(module).__name__}; leanlift trains nn.Linear, bnb.nn.Linear4bit and "
        "bnb.nn.Linear8bitLt: leave it out with exclude_modules."
    )


def _of_its_shape(weight: FrozenWeight, module: nn.Module, name: str) -> FrozenWeight:
    """A checkpoint whose matrices have other sizes than its config.json says is quantized and
    loaded all the same; the product then fails, or means nothing."""
    holder: Any = module
    expected = (holder.out_features, holder.in_features)
    if weight.shape != expected:
        raise UserError(
            f"{name} holds a {weight.shape[0]}x{weight.shape[1]} weight, and was to have "
            f"{expected[0]}x{expected[1]}: the checkpoint has other shapes than its config.json "
            "says."
        )
    return weight


def is_quantized(module: nn.Module) -> bool:
    """Whether bitsandbytes holds this module's weight."""
    return bnb.is_linear4bit(module) or bnb.is_linear8bit(module)


def requantize(weight: RowTiles | Tensor, fmt: WeightFormat, device: torch.device) -> RowTiles:
    """Quantize a 16/32-bit weight [m, n] as stock transformers would have when loading it.

    The weight is read by row tiles; what is held is its quantized form. INT8 is quantized from
    fp16, whatever `weight` comes in.

    Returns its dequantized rows: bit-equal to the loaded model's on the same kind of device.
    """
    tiles = as_tiles(weight)
    if fmt.kind == "dense":
        return CastTiles(tiles, fmt.torch_dtype)
    if fmt.kind == "int8":
        return Weight8bit(bnb.quantize_8bit(tiles.rows, tiles.shape, device))
    return Weight4bit(
        bnb.quantize_4bit(
            tiles.rows, tiles.shape, fmt.kind, fmt.blocksize, fmt.double, fmt.torch_dtype, device
        )
    )


def quantizing_int8_nbytes(shape: tuple[int, int]) -> int:
    """What `requantize` takes for INT8 beside a dense weight and its INT8 form: of a tile the
    numbers in fp16, their codes, and as much while these are made."""
    return 4 * min(bnb.QUANTIZED_AT_ONCE, shape[0] * shape[1])


def embedding_rows(module: nn.Module, ids: Tensor) -> Tensor:
    """Rows `ids` of a module's weight [V, d], dequantized: [..., d]."""
    weight = module.weight
    if isinstance(weight, Tensor) and weight.dtype.is_floating_point:
        return nn.functional.embedding(ids, weight)
    return bnb.gather_8bit_rows(module, ids)
