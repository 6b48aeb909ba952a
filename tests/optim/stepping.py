"""Steps of an optimizer on gradients that are the same on every machine."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

COUNT = 5003  # above bitsandbytes' 4096, and no multiple of a block or of a vector register
VARIANTS = list(itertools.product((torch.float32, torch.bfloat16), ("float32", "8bit")))


def gradients(steps: int, count: int = COUNT, seed: int = 1) -> list[Tensor]:
    """Gradients whose sizes differ from entry to entry, and drift."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.05, 1, count)
    return [torch.randn(count, generator=generator) * scale + 0.1 for _ in range(steps)]


def start(dtype: torch.dtype = torch.float32, count: int = COUNT) -> nn.Parameter:
    generator = torch.Generator().manual_seed(2)
    return nn.Parameter(torch.randn(count, generator=generator).to(dtype))


def train(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, grads: list[Tensor], first: int = 0
) -> Tensor:
    """Steps with a falling learning rate; the values afterwards."""
    for number, grad in enumerate(grads, first):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + number / 10)
        parameter.grad = grad.to(parameter.dtype)
        optimizer.step()
    return parameter.detach().clone()
