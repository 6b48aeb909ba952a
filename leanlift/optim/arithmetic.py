"""The arithmetic of AdamW on fp32 chunks, and stochastic rounding: pure, without any state.

**bf16 values** have 8 bits of precision: an update below 1/512 of a value is lost by rounding to
nearest. Stochastic rounding keeps it on average. The noise depends on the seed, the step, the
parameter's place in the groups and the chunk alone, so a resumed run continues bit for bit, on the
same kind of device, without any generator state.

**Newcomers.** An entry that enters under an old step count has no history, while bias correction
is over: plain Adam would move it by up to (1 - β1) / sqrt(1 - β2) times the learning rate at once
(3.2 for β = (0.9, 0.999)), and by up to 6.6 times soon after. Where the first moment is exactly
zero, the update is therefore clamped to the learning rate. At step 1 Adam does that by itself, and
with β = (0.9, 0.95) at every step.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_BF16_MAX = torch.finfo(torch.bfloat16).max


def adamw_update(
    value: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step of torch.optim.AdamW, in place on `value`, `first` and `second`.

    The one exception: where `first` is exactly zero before the step, the update (without weight
    decay) is clamped to `lr` in absolute value, up to rounding. At step 1 Adam needs no clamp.

    Args:
        value, grad, first, second: fp32 [k], contiguous; `grad` is only read.
        step: how many steps there are with this one, from 1.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW; the decay is decoupled, and pulls an
            offset towards zero, that is, the weight towards its base.
    """
    if value.device.type == "cpu":
        _on_a_cpu(value, grad, first, second, step, lr, betas, eps, weight_decay)
    else:
        by_operations(value, grad, first, second, step, lr, betas, eps, weight_decay)


def by_operations(
    value: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """`adamw_update` in a dozen passes, on any device; Triton's kernel has their order."""
    beta1, beta2 = betas
    correction1, correction2 = 1 - beta1**step, math.sqrt(1 - beta2**step)
    fresh = first == 0 if _may_clamp(step, betas) else None
    first.lerp_(grad, 1 - beta1)
    second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    # m̂ / (sqrt(v̂) + eps) is `update` times correction2 / correction1.
    update = second.sqrt().add_(eps * correction2)
    torch.div(first, update, out=update)
    if fresh is not None:
        bound = correction1 / correction2
        update = torch.where(fresh, update.clamp(-bound, bound), update)
    if weight_decay:
        value.mul_(1 - lr * weight_decay)
    value.add_(update, alpha=-lr * correction2 / correction1)


def _on_a_cpu(
    value: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """`adamw_update` by the kernel of `torch.optim.AdamW(fused=True)`, which is one pass and clamps
    nothing; where a clamp was due, what was too much is given back."""
    beta1, beta2 = betas
    correction1, correction2 = 1 - beta1**step, math.sqrt(1 - beta2**step)
    places = _zeros_of(first) if _may_clamp(step, betas) else first.new_empty(0, dtype=torch.int64)
    torch._fused_adamw_(
        [value],
        [grad],
        [first],
        [second],
        [],
        [torch.tensor(float(step))],
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
    if len(places):
        bound = correction1 / correction2
        update = first[places].div_(second[places].sqrt_().add_(eps * correction2))
        update.sub_(update.clamp(-bound, bound))  # what was too much
        value.index_add_(0, places, update, alpha=lr * correction2 / correction1)


def round_stochastically(value: Tensor, noise: Tensor) -> Tensor:
    """fp32 `value` as bf16, rounded to one of its two neighbours so that the mean is `value`.

    The noise is added below the bits that bf16 keeps, which are then cut off. A value that bf16
    holds exactly stays; one beyond its largest number becomes that number; infinities and NaN stay
    what they are.

    Args:
        value: fp32 [k].
        noise: int32 [k], uniform on 0..65535; overwritten.
    """
    noise.mul_(value.abs() < _BF16_MAX)
    bits = noise.add_(value.view(torch.int32)).bitwise_and_(-65536)
    return bits.view(torch.float32).to(torch.bfloat16)


def uniform_noise(count: int, device: torch.device, *key: int) -> Tensor:
    """int32 [count], uniform on 0..65535, the same for the same key and kind of device."""
    generator = torch.Generator(device).manual_seed(seed_of(*key) >> 1)
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[:count].to(torch.int32).add_(32768)


def seed_of(*key: int) -> int:
    """64 bits that depend on the key alone."""
    digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _may_clamp(step: int, betas: tuple[float, float]) -> bool:
    """Whether an entry whose first moment is zero can move by more than the learning rate: by
    (1 - β1) |g| / sqrt(β2 v + (1 - β2) g²) at most, with both moments corrected. Never for the
    default (0.9, 0.95)."""
    beta1, beta2 = betas
    bound = (1 - beta1**step) / math.sqrt(1 - beta2**step)
    return step > 1 and (1 - beta1) / math.sqrt(1 - beta2) > bound


def _zeros_of(first: Tensor) -> Tensor:
    """Where `first`, on a CPU, is zero: int64 [count]. Counting is cheap where it is nowhere."""
    if int(first.count_nonzero()) == first.numel():
        return first.new_empty(0, dtype=torch.int64)
    return (first == 0).nonzero().view(-1)
