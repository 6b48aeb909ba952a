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
from dataclasses import dataclass

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
    taken = Step(step, lr, betas, eps, weight_decay)
    way = _on_a_cpu if value.device.type == "cpu" else by_operations
    way(value, grad, first, second, taken)


@dataclass(frozen=True)
class Step:
    """The numbers of one step, as `adamw_update` has them.

    Attributes:
        step, lr, betas, eps, weight_decay: see there.
    """

    step: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float

    @property
    def corrections(self) -> tuple[float, float]:
        """What the first moment and the root of the second are divided by."""
        beta1, beta2 = self.betas
        return 1 - beta1**self.step, math.sqrt(1 - beta2**self.step)

    @property
    def eps_before(self) -> float:
        """eps beside a root that is not corrected."""
        return self.eps * self.corrections[1]

    @property
    def bound(self) -> float:
        """The largest quotient of uncorrected moments that moves an offset by no more than lr."""
        return self.corrections[0] / self.corrections[1]

    @property
    def clamps(self) -> bool:
        """Whether an entry whose first moment is zero can move by more than lr: its quotient is
        (1 - β1) |g| / sqrt(β2 v + (1 - β2) g²) at most. Never for the default (0.9, 0.95)."""
        beta1, beta2 = self.betas
        return self.step > 1 and (1 - beta1) / math.sqrt(1 - beta2) > self.bound


def by_operations(value: Tensor, grad: Tensor, first: Tensor, second: Tensor, step: Step) -> None:
    """`adamw_update` in a dozen passes, on any device; Triton's kernel has their order."""
    beta1, beta2 = step.betas
    fresh = first == 0 if step.clamps else None
    first.lerp_(grad, 1 - beta1)
    second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    update = second.sqrt().add_(step.eps_before)
    torch.div(first, update, out=update)
    if fresh is not None:
        update = torch.where(fresh, update.clamp(-step.bound, step.bound), update)
    if step.weight_decay:
        value.mul_(1 - step.lr * step.weight_decay)
    value.add_(update, alpha=-step.lr / step.bound)


def _on_a_cpu(value: Tensor, grad: Tensor, first: Tensor, second: Tensor, step: Step) -> None:
    """`adamw_update` by the kernel of `torch.optim.AdamW(fused=True)`, which is one pass and clamps
    nothing; where a clamp was due, what was too much is given back."""
    places = _zeros_of(first) if step.clamps else None
    torch._fused_adamw_(
        [value],
        [grad],
        [first],
        [second],
        [],
        [torch.tensor(float(step.step))],
        lr=step.lr,
        beta1=step.betas[0],
        beta2=step.betas[1],
        weight_decay=step.weight_decay,
        eps=step.eps,
        amsgrad=False,
        maximize=False,
    )
    if places is not None:
        update = first[places].div_(second[places].sqrt_().add_(step.eps_before))
        update.sub_(update.clamp(-step.bound, step.bound))  # what was too much
        value.index_add_(0, places, update, alpha=step.lr / step.bound)


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


def _zeros_of(first: Tensor) -> Tensor | None:
    """Where `first`, on a CPU, is zero: int64 [count]; None: nowhere, which is told cheaply."""
    if int(first.count_nonzero()) == first.numel():
        return None
    return (first == 0).nonzero().view(-1)
