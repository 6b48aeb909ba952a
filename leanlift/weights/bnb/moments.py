"""The 8-bit moments of bitsandbytes' optimizers: codes, scales of blocks, tables."""

from __future__ import annotations

import functools
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as F
import torch
from torch import Tensor

MOMENT_BLOCK = 256  # entries that share one absmax, in bitsandbytes' optimizers and in ours


@functools.cache
def moment_table(device: torch.device, signed: bool) -> Tensor:
    """The dynamic map of first (signed) or second moments, ascending fp32 [256], one per device."""
    return F.create_dynamic_map(signed=signed).to(device)


def dequantize_moment(codes: Tensor, absmax: Tensor, table: Tensor) -> Tensor:
    """fp32 [k] from uint8 codes [k], whose blocks of 256 have the fp32 scales `absmax`."""
    quantized = F.QuantState(absmax=absmax, code=table, blocksize=MOMENT_BLOCK, dtype=torch.float32)
    return F.dequantize_blockwise(codes, quantized)


def quantize_moment(
    moment: Tensor, table: Tensor, codes: Tensor, absmax: Tensor, signed: bool
) -> None:
    """Write fp32 `moment` [k] into `codes` and `absmax`; `signed` says which map `table` is.

    Two repairs of what bitsandbytes does near zero: its CPU quantizer maps a zero to a code some
    places off, and a small second moment may be rounded to zero, which an update would divide by.
    Here a zero is an exact zero, and with an unsigned table nothing else is.
    """
    rounded, quantized = F.quantize_blockwise(
        moment.to(torch.float32).contiguous(), code=table, blocksize=MOMENT_BLOCK
    )
    if not signed:
        rounded.clamp_min_(1)
    # The signed map has 127 negative values. A comparison with the table would stall a GPU.
    codes.copy_(rounded.masked_fill_(moment == 0, 127 if signed else 0))
    absmax.copy_(quantized.absmax)


def is_adam_8bit(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this is bitsandbytes' Adam or AdamW: 8-bit or 32-bit state, paged or not."""
    names = ("Adam", "Adam8bit", "Adam32bit", "AdamW", "AdamW8bit", "AdamW32bit")
    kinds = tuple(getattr(bnb.optim, prefix + name) for prefix in ("", "Paged") for name in names)
    return isinstance(optimizer, kinds)


def read_moment(state: dict[str, Any], which: int) -> Tensor:
    """Moment `which` (1 or 2) of one parameter's bitsandbytes state, as fp32.

    A paged moment lies in managed memory, which torch takes for a CPU tensor: it is copied to the
    device on which its parameter lives.
    """
    stored = state[f"state{which}"]
    if getattr(stored, "is_paged", False):
        device = torch.device("cuda", stored.page_deviceid)
        torch.cuda.synchronize(device)
        stored = stored.to(device)
    if stored.dtype != torch.uint8:
        return stored.float()
    return dequantize_moment(stored, state[f"absmax{which}"], state[f"qmap{which}"])


def write_moment(state: dict[str, Any], which: int, moment: Tensor) -> None:
    """Write fp32 `moment` back into the storage that `read_moment` read it from."""
    stored = state[f"state{which}"]
    if stored.dtype != torch.uint8:
        stored.copy_(moment)
        return
    table, absmax = state[f"qmap{which}"], state[f"absmax{which}"]
    quantize_moment(moment, table, stored, absmax, signed=which == 1)
