"""bitsandbytes' quantized Linears: which module is which, and how to read or make one by rows.

Two traps of its CPU path decide the way in which this file reads a weight (both seen with 0.50.2):

* `Linear4bit.forward` in eval mode repacks the weight for an AVX-512 kernel, after which
  dequantization is silently wrong. leanlift never calls that forward, and refuses a weight that
  somebody else had repacked.
* The AVX-512 dequantization is wrong when the last dimension of the stated shape is not a
  multiple of 64. Ranges are therefore dequantized as one row of shape `(1, numel)`.

A 4-bit weight is the row-major flattened matrix, two values a byte, with one `absmax` per block
of `blocksize` values; the absmax may itself be quantized in blocks (double quantization). A row
range is widened to block boundaries, dequantized alone, and trimmed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import bitsandbytes as bnb
import bitsandbytes.functional as F
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from bitsandbytes.utils import unpack_tensor_to_dict
from torch import Tensor, nn

Rows = Callable[[int, int], Tensor]
"""rows(start, stop) of a matrix [m, n]: a tensor [stop - start, n]."""

QUANTIZED_AT_ONCE = 2**22
"""Values of a tile that is quantized: 8 MiB in fp16, and some such temporaries."""


def is_linear4bit(module: nn.Module) -> bool:
    """Whether bitsandbytes holds this module's weight in 4 bits."""
    return isinstance(module, Linear4bit)


def is_linear8bit(module: nn.Module) -> bool:
    """Whether bitsandbytes holds this module's weight in 8 bits."""
    return isinstance(module, Linear8bitLt)


# --- 4-bit weights -------------------------------------------------------------------------


def problem_4bit(module: nn.Module) -> str | None:
    """Why this `Linear4bit` cannot be read row by row, or None."""
    weight = cast(Any, module).weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return "its weight is not quantized yet (move the model to its device first)"
    if getattr(state, "packing_format_for_cpu", False):
        return (
            "a forward pass in eval mode has repacked its weight for bitsandbytes' CPU kernel; "
            "load the model again and attach leanlift before any forward pass"
        )
    if state.shape is None or len(state.shape) != 2:
        return "its weight is packed without a 2-D shape"
    return None


def state_4bit(module: nn.Module) -> Any:
    """bitsandbytes' `QuantState` of a `Linear4bit` weight."""
    return cast(Any, module).weight.quant_state


def dequantize_4bit_range(module: nn.Module, start: int, stop: int) -> Tensor:
    """Values `start:stop` of the flattened weight of a `Linear4bit`, as a 1-D tensor.

    The dtype is the one the weight had when it was quantized. Bit-equal to the same slice of the
    whole weight dequantized at once.
    """
    state = state_4bit(module)
    block, numel = state.blocksize, state.shape[0] * state.shape[1]
    lo, hi = start // block * block, min(-(-stop // block) * block, numel)
    packed = cast(Any, module).weight.data.reshape(-1).view(torch.uint8)[lo // 2 : -(-hi // 2)]
    whole = F.QuantState(
        absmax=_absmax_range(state, lo // block, -(-hi // block)),
        shape=torch.Size((1, hi - lo)),
        dtype=state.dtype,
        blocksize=block,
        quant_type=state.quant_type,
        code=state.code,
    )
    # A packed tensor of one row would be read as transposed: hand it over as a column.
    values = F.dequantize_4bit(packed.reshape(-1, 1), whole).reshape(-1)
    return values[start - lo : stop - lo]


def parts_4bit(
    module: nn.Module,
) -> tuple[Tensor, Tensor, Tensor, int, tuple[Tensor, Tensor, Tensor, int] | None]:
    """(packed uint8 bytes, absmax, table, blocksize, nested) of a `Linear4bit` weight, nothing
    copied; nested: (absmax, table, offset, blocksize) of quantized scales, or None."""
    state = state_4bit(module)
    packed = cast(Any, module).weight.data.reshape(-1).view(torch.uint8)
    nested = None
    if state.nested:
        inner = state.state2
        nested = (inner.absmax, inner.code, state.offset, inner.blocksize)
    return packed, state.absmax, state.code, state.blocksize, nested


def quantize_4bit(
    rows: Rows,
    shape: tuple[int, int],
    kind: str,
    blocksize: int,
    double: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    """A bias-free `Linear4bit` of `shape`, quantized from `dtype` on `device`, tile by tile.

    Bit-equal to quantizing the whole at once: a scale belongs to one block, and tiles start at
    blocks. Only the scales are quantized as a whole, as bitsandbytes does it.
    """
    m, n = shape
    packed = torch.empty(-(-m * n // 2), 1, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-m * n // blocksize), device=device)
    code = None
    step = max(blocksize, QUANTIZED_AT_ONCE // n // blocksize * blocksize)
    for start in range(0, m, step):
        tile = rows(start, min(start + step, m)).to(device, dtype).contiguous()
        codes, state = F.quantize_4bit(tile, blocksize=blocksize, quant_type=kind)
        first = start * n
        packed[first // 2 : first // 2 + codes.numel()] = codes.view(-1, 1)
        absmax[first // blocksize : first // blocksize + state.absmax.numel()] = state.absmax
        code = state.code
    offset = nested = None
    if double:
        offset = absmax.mean()
        absmax, nested = F.quantize_blockwise(absmax - offset, blocksize=256)
    module = Linear4bit(
        n, m, bias=False, quant_type=kind, compress_statistics=double, device="meta"
    )
    module.weight = bnb.nn.Params4bit(
        packed,
        requires_grad=False,
        quant_state=F.QuantState(
            absmax=absmax,
            shape=torch.Size(shape),
            dtype=dtype,
            blocksize=blocksize,
            code=code,
            quant_type=kind,
            offset=offset,
            state2=nested,
        ),
        quant_type=kind,
        compress_statistics=double,
        blocksize=blocksize,
        bnb_quantized=True,
        module=module,
    )
    return module


STATE_4BIT = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")
"""How a checkpoint calls what describes a 4-bit weight, after the weight's name and a dot."""

PARTS_4BIT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *STATE_4BIT)


def describe_4bit(packed: Tensor) -> dict[str, Any]:
    """What a checkpoint says of a 4-bit weight: shape, dtype, blocksize, quant_type."""
    return unpack_tensor_to_dict(packed)


def stored_4bit(weight: Tensor, parts: dict[str, Tensor]) -> nn.Module:
    """A bias-free `Linear4bit` over a weight as a checkpoint holds it; `parts` by their
    `PARTS_4BIT` names."""
    data = bnb.nn.Params4bit.from_prequantized(weight, dict(parts), device="cpu")
    m, n = data.quant_state.shape
    if (data.quant_state.absmax.dtype == torch.uint8) != bool(data.quant_state.nested):
        raise ValueError("its scales are quantized, and what they were quantized by is not there")
    module = Linear4bit(n, m, bias=False, quant_type=data.quant_type, device="meta")
    module.weight = data
    return module


def stored_8bit(codes: Tensor, scales: Tensor) -> nn.Module:
    """A bias-free `Linear8bitLt` over codes int8 [m, n] and scales fp32 [m]."""
    m, n = codes.shape
    module = Linear8bitLt(n, m, bias=False, has_fp16_weights=False, device="meta")
    module.weight = bnb.nn.Int8Params(
        codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales
    )
    return module


def _absmax_range(state: Any, first: int, last: int) -> Tensor:
    """fp32 absmax of blocks `first:last`, undoing the double quantization if there is one."""
    if not state.nested:
        return state.absmax[first:last]
    nested = state.state2
    lo = first // nested.blocksize * nested.blocksize
    hi = min(-(-last // nested.blocksize) * nested.blocksize, state.absmax.numel())
    inner = F.QuantState(
        absmax=nested.absmax[lo // nested.blocksize : -(-hi // nested.blocksize)],
        code=nested.code,
        blocksize=nested.blocksize,
        dtype=nested.dtype,
    )
    absmax = F.dequantize_blockwise(state.absmax[lo:hi], inner) + state.offset
    return absmax[first - lo : last - lo].float()


# --- 8-bit weights -------------------------------------------------------------------------


def state_8bit(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """`(CB int8 [m, n], SCB fp32 [m])` of a `Linear8bitLt`, or None where it is not quantized.

    bitsandbytes moves both from the weight to the module's state at the first forward pass. torch
    moves a module by giving the weight other data, and leaves both where they were: the codes are
    the data therefore, and the scales follow them.
    """
    holder = cast(Any, module)
    weight = holder.weight
    place = weight if weight.SCB is not None else holder.state
    codes = weight.CB if weight.CB is not None else getattr(place, "CB", None)
    if weight.data.dtype == torch.int8:
        codes = weight.data
    if codes is None or place.SCB is None or codes.dtype != torch.int8:
        return None
    if place.SCB.device != codes.device:
        place.SCB, place.CB = place.SCB.to(codes.device), codes
    return codes, place.SCB


def dequantize_8bit_rows(module: nn.Module, start: int, stop: int) -> Tensor:
    """Rows `start:stop` of a `Linear8bitLt` weight in fp32: `CB * SCB / 127`."""
    state = state_8bit(module)
    assert state is not None
    codes, scales = state
    return F.int8_vectorwise_dequant(codes[start:stop], scales[start:stop])


def gather_8bit_rows(module: nn.Module, ids: Tensor) -> Tensor:
    """Rows `ids` [...] of a `Linear8bitLt` weight in fp32: [..., n]."""
    state = state_8bit(module)
    assert state is not None
    codes, scales = state
    flat = ids.reshape(-1)
    rows = F.int8_vectorwise_dequant(codes[flat], scales[flat])
    return rows.view(*ids.shape, codes.shape[1])


def quantize_8bit(rows: Rows, shape: tuple[int, int], device: torch.device) -> nn.Module:
    """A bias-free `Linear8bitLt` of `shape`, quantized on `device`, tile by tile.

    Bit-equal to quantizing the whole at once, for which bitsandbytes' CPU path needs six times
    the bytes of the weight: a scale belongs to one row.
    """
    m, n = shape
    codes = torch.empty(m, n, dtype=torch.int8, device=device)
    scales = torch.empty(m, device=device)
    step = max(1, QUANTIZED_AT_ONCE // n)
    for start in range(0, m, step):
        stop = min(start + step, m)
        tile = rows(start, stop).to(device, torch.float16).contiguous()
        codes[start:stop], scales[start:stop], _ = F.int8_vectorwise_quant(tile)
    return stored_8bit(codes, scales)


def places_of(module: nn.Module) -> list[tuple[Any, str]]:
    """Where the tensors of a bitsandbytes Linear are read from that grow with it, as objects and
    names of attributes; the lookup tables, of a kilobyte, are not among them. What INT8 codes are
    called besides is dropped, so that others can be put in their place."""
    holder: Any = module
    if is_linear4bit(module):
        state = state_4bit(module)
        nested = [(state.state2, "absmax")] if state.nested else []
        return [(holder.weight, "data"), (state, "absmax"), *nested]
    codes_and_scales = state_8bit(module)
    assert codes_and_scales is not None
    weight = holder.weight
    place = weight if weight.SCB is not None else holder.state
    weight.CB = holder.state.CB = None  # other names of the data, which would keep it alive
    return [(weight, "data"), (place, "SCB")]


def tables_of(module: nn.Module) -> list[tuple[Any, str]]:
    """Where the lookup tables of a 4-bit Linear are read from."""
    if not is_linear4bit(module):
        return []
    state = state_4bit(module)
    return [(state, "code"), *([(state, "offset"), (state.state2, "code")] if state.nested else [])]


def tensors_of(module: nn.Module) -> list[Tensor]:
    """All tensors that hold the weight of a bitsandbytes Linear, lookup tables included."""
    if is_linear4bit(module):
        state = state_4bit(module)
        held = [cast(Any, module).weight.data, state.absmax, state.code]
        if state.nested:
            held += [state.offset, state.state2.absmax, state.state2.code]
        return held
    state8 = state_8bit(module)
    return [cast(Any, module).weight.data, *(state8 or ())]
