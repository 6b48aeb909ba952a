"""Which classes of Linears compute what a Linear computes: tried on numbers, not told by names.

Some keep the transpose of its matrix, as the Conv1D of GPT-2 does: `is_turned_linear`. Quantized,
those hold the matrix [m, n] as others do; in a checkpoint that is not, it is [n, m].
"""

from __future__ import annotations

import functools
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether this is an nn.Linear, or of a class of them that computes what it computes."""
    kind: Any = type(module)
    return isinstance(module, nn.Linear) and _computes_as_linear(kind)


def is_turned_linear(module: nn.Module) -> bool:
    """Whether this is no nn.Linear, and gives x W + b with its weight W [n, m]."""
    if isinstance(module, nn.Linear):
        return False
    kind: Any = type(module)
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and computes_turned(kind)


def is_dense_linear(module: nn.Module) -> bool:
    """Whether this is a Linear in 16 or 32 bits, its matrix turned or not."""
    return is_plain_linear(module) or is_turned_linear(module)


def is_stored_turned(module: nn.Module) -> bool:
    """Whether the weight of this Linear, quantized or not, is [n, m] in a 16-bit checkpoint."""
    source = getattr(module, "source_cls", None)  # what a quantized one was
    return is_turned_linear(module) or (isinstance(source, type) and computes_turned(source))


def matrix_of(module: nn.Module) -> Tensor:
    """The weight of a Linear in 16 or 32 bits, [m, n]: a view that may be written to."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if is_turned_linear(module) else weight.detach()


@functools.cache
def _computes_as_linear(kind: Any) -> bool:
    """Whether a class of Linears gives x W^T + b, whatever its forward is; not told from its name,
    but by an instance of it. Classes that quantize, scale or gather as they multiply do not."""
    if kind is nn.Linear:
        return True
    if kind.__module__.partition(".")[0] == "bitsandbytes":
        return False

    def makes() -> list[nn.Module]:
        return [kind(4, 5, bias=bias) for bias in (True, False)]

    return _computes(makes, (5, 4), lambda weight: weight)


@functools.cache
def computes_turned(kind: Any) -> bool:
    """Whether a class, made with m and n, gives x W + b with a weight W [n, m]."""
    if kind.__module__.partition(".")[0] in ("torch", "bitsandbytes", "leanlift"):
        return False
    return _computes(lambda: [kind(5, 4)], (4, 5), lambda weight: weight.T)


def _computes(makes: Any, shape: tuple[int, int], matrix: Any) -> bool:
    """Whether all that is made gives x M^T + b, where M [5, 4] is the `matrix` of its weight."""
    try:
        with _disable_current_modes(), torch.random.fork_rng([]), torch.no_grad():
            x = torch.linspace(-3, 3, 24, device="cpu").view(2, 3, 4)
            for made in makes():
                one = made.to("cpu").eval()
                if set(dict(one.named_parameters())) - {"weight", "bias"}:
                    return False
                one.weight.copy_(torch.linspace(-1, 2, 20).view(shape))
                if one.bias is not None:
                    one.bias.copy_(torch.linspace(1, 3, 5))
                wanted = nn.functional.linear(x, matrix(one.weight), one.bias)
                if not torch.allclose(one(x), wanted, rtol=1e-5, atol=1e-5):
                    return False
    except Exception:  # it is made or called in another way
        return False
    return True
