"""Which classes of Linears compute what a Linear computes: tried on numbers, not told by names."""

from __future__ import annotations

import functools
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether this is an nn.Linear, or of a class of them that computes what it computes."""
    kind: Any = type(module)
    return isinstance(module, nn.Linear) and _computes_as_linear(kind)


@functools.cache
def _computes_as_linear(kind: Any) -> bool:
    """Whether a class of Linears gives x W^T + b, whatever its forward is; not told from its name,
    but by an instance of it. Classes that quantize, scale or gather as they multiply do not."""
    if kind is nn.Linear:
        return True
    if kind.__module__.partition(".")[0] == "bitsandbytes":
        return False
    try:
        with _disable_current_modes(), torch.no_grad():
            x = torch.linspace(-3, 3, 24, device="cpu").view(2, 3, 4)
            for bias in (True, False):
                one = kind(4, 5, bias=bias).to("cpu").eval()
                one.weight.copy_(torch.linspace(-1, 2, 20).view(5, 4))
                if bias:
                    one.bias.copy_(torch.linspace(1, 3, 5))
                wanted = nn.functional.linear(x, one.weight, one.bias)
                if not torch.allclose(one(x), wanted, rtol=1e-5, atol=1e-5):
                    return False
    except Exception:  # it is made or called in another way
        return False
    return True
