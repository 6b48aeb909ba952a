"""Ways to go through a module once and back, as it is and recomputed, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

Run = Callable[[Any], Callable[[Tensor], Tensor]]

RUNS: dict[str, Run] = {
    "as it is": lambda module: module,
    "recomputed": lambda module: lambda x: checkpoint(module, x, use_reentrant=False),
    "recomputed by another pass": lambda module: (
        lambda x: checkpoint(module, x, use_reentrant=True)
    ),
    "recomputed, called twice": lambda module: (
        lambda x: checkpoint(lambda x: module(x) + module(2 * x), x, use_reentrant=False)
    ),
}


def gradients(run: Callable[[Tensor], Tensor], module: Any, x: Tensor) -> list[Tensor]:
    """y, and the gradients of x and of what is trained."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = run(x)
    y.float().square().sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]
