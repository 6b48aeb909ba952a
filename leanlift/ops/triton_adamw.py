"""One step of AdamW over a whole vector of values, in one Triton kernel.

Plain torch takes some twenty launches per chunk of 2^18 entries, of which a 7B model at 5 % has
1,235. Here a vector takes one launch, and every entry is read and written once.

The arithmetic is `optim.adamw.adamw_update`, without fused multiply-adds: they round once where
torch rounds twice. 8-bit moments have the layout of `optim.moments`: the
nearest entry of an ascending table times the block's largest magnitude; a zero stays an exact
zero, and nothing else becomes one in the second moment. Stochastic rounding draws other noise than
torch's way, of the same distribution; it depends on the seed and the entry alone.

Only the last program may reach beyond the end of a vector. It alone reads and writes under a mask.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanlift.ops.parts import MomentParts

BLOCK = tl.constexpr(256)
ROWS = 4
REGISTERS = 128
"""That a thread may take: where ptxas looks for fewer by itself, it spills some on some cards."""
ZERO_SIGNED = tl.constexpr(127)
BF16_MAX = tl.constexpr(torch.finfo(torch.bfloat16).max)


@triton.jit
def _read(pointers, inside, whole):
    """What `pointers` hold, 0 where not `inside`. `whole`: all are; without a mask a thread reads
    up to 16 bytes at once, with one an entry, since the count is no multiple of 16."""
    if whole:  # noqa: SIM108 - a kernel's branch
        held = tl.load(pointers)
    else:
        held = tl.load(pointers, mask=inside, other=0)
    return held


@triton.jit
def _write(pointers, held, inside, whole):
    """Write what is `inside`, as `_read` reads it."""
    if whole:
        tl.store(pointers, held)
    else:
        tl.store(pointers, held, mask=inside)


@triton.jit
def _nearest(x, table):
    """The place of the entry of an ascending table [256] that is nearest to x."""
    place = tl.zeros_like(x).to(tl.int32)
    for bit in tl.static_range(7, -1, -1):
        further = place + (1 << bit)
        place = tl.where(tl.load(table + further) <= x, further, place)
    above = tl.minimum(place + 1, 255)
    closer = tl.load(table + above) - x < x - tl.load(table + place)
    return tl.where(closer, above, place)


@triton.jit
def _store_codes(
    moment, codes, absmax, table, entry, block, inside, whole, blocks, SIGNED: tl.constexpr
):
    """Quantize [rows, 256] moments and write codes and scales."""
    largest = tl.max(tl.abs(moment), 1)
    tl.store(absmax + block, largest, mask=block < blocks)
    scale = tl.where(largest > 0, largest, 1.0)
    code = _nearest(tl.div_rn(moment, tl.broadcast_to(scale[:, None], moment.shape)), table)
    if SIGNED:
        code = tl.where(moment == 0, ZERO_SIGNED, code)
    else:
        code = tl.where(moment == 0, 0, tl.maximum(code, 1))
    _write(codes + entry, code.to(tl.uint8), inside, whole)


@triton.jit(do_not_specialize=["seed"])
def adamw_kernel(
    value, grad, first, second, first_absmax, second_absmax, first_table, second_table, apply,
    count, seed, lerp, beta2, eps, keep, rate, bound,
    EIGHT: tl.constexpr, CLAMP: tl.constexpr, STOCHASTIC: tl.constexpr, ASKS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS blocks of 256 entries per program; ASKS: of none where the byte at `apply` is zero.

    lerp = 1 - beta1; eps is scaled by the second correction; keep = 1 - lr * decay; rate = lr over
    the corrections; bound is what an update is clamped to where the first moment is zero.
    """
    block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    entry = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    if ASKS:
        count = tl.where(tl.load(apply) != 0, count, 0)
    inside = entry < count
    whole = count - tl.program_id(0) * ROWS * BLOCK >= ROWS * BLOCK
    blocks = tl.cdiv(count, BLOCK)
    held = _read(value + entry, inside, whole).to(tl.float32)
    slope = _read(grad + entry, inside, whole).to(tl.float32)
    if EIGHT:
        code = _read(first + entry, inside, whole).to(tl.int32)
        one = tl.load(first_absmax + block, mask=block < blocks, other=0.0)
        m = tl.load(first_table + code) * one[:, None]
        code = _read(second + entry, inside, whole).to(tl.int32)
        two = tl.load(second_absmax + block, mask=block < blocks, other=0.0)
        v = tl.load(second_table + code) * two[:, None]
    else:
        m = _read(first + entry, inside, whole)
        v = _read(second + entry, inside, whole)
    fresh = m == 0
    m = m + lerp * (slope - m)
    v = v * beta2 + (1 - beta2) * slope * slope
    update = tl.div_rn(m, tl.sqrt_rn(v) + eps)
    if CLAMP:
        update = tl.where(fresh, tl.minimum(tl.maximum(update, -bound), bound), update)
    held = held * keep - rate * update
    if STOCHASTIC:
        noise = (tl.randint(seed, entry) & 65535).to(tl.int32)
        noise = tl.where(tl.abs(held) < BF16_MAX, noise, 0)
        bits = (held.to(tl.int32, bitcast=True) + noise) & -65536
        held = bits.to(tl.float32, bitcast=True)
    _write(value + entry, held.to(value.dtype.element_ty), inside, whole)
    if EIGHT:
        m = tl.where(inside, m, 0.0)
        v = tl.where(inside, v, 0.0)
        _store_codes(m, first, first_absmax, first_table, entry, block, inside, whole, blocks, True)
        _store_codes(
            v, second, second_absmax, second_table, entry, block, inside, whole, blocks, False
        )
    else:
        _write(first + entry, m, inside, whole)
        _write(second + entry, v, inside, whole)


def adamw_step_(
    value: Tensor,
    grad: Tensor,
    moments: MomentParts,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    seed: int | None,
    apply: Tensor | None = None,
) -> None:
    """One step in place on `value` [k] (fp32 or bf16) and `moments`.

    Args:
        value, grad: contiguous, [k].
        moments: fp32 or 8-bit, of k entries.
        step, lr, betas, eps, weight_decay: as `adamw_update` has them.
        seed: of the stochastic rounding, below 2^31; None rounds to nearest.
        apply: bool scalar, read on the device: where it is False, nothing changes.
    """
    count = value.numel()
    assert count < 2**31
    correction1, correction2 = 1 - betas[0] ** step, math.sqrt(1 - betas[1] ** step)
    with torch.cuda.device_of(value):  # Triton launches on the current one
        adamw_kernel[(triton.cdiv(count, ROWS * BLOCK.value),)](
            value, grad, moments.first, moments.second, moments.first_absmax, moments.second_absmax,
            moments.first_table, moments.second_table,
            None if apply is None else apply.view(torch.uint8),
            count, seed or 0, 1 - betas[0], betas[1], eps * correction2,
            1 - lr * weight_decay, lr * correction2 / correction1, correction1 / correction2,
            EIGHT=moments.first_absmax is not None, CLAMP=step > 1,
            STOCHASTIC=seed is not None and value.dtype == torch.bfloat16, ASKS=apply is not None,
            ROWS=ROWS, maxnreg=REGISTERS, enable_fp_fusion=False,
        )  # fmt: skip
