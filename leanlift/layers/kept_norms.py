"""Frozen norms that keep their input, and nothing else.

A norm in 16 bits computes in fp32. Written as a handful of operations it keeps its input in that
width, and the Linears behind it keep its output: six bytes a number, of which two are enough to
make the rest of. So the input is kept as it came, and the output is made again when gradients come,
once for all the Linears that it went to and for the norm itself, as `made_again` has it.

In a block that is recomputed the norm has just computed, and its input, which would have to wait
beside what it computed, is not kept: there it is its own. Gradients are the same to the bit.

Taken are norms over the last dimension whose class, tried on numbers, treats each row alone. How
they compute is up to others: as their class does, in pieces (`tiled_norms`), or by a kernel
(`fused_elementwise`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from leanlift.layers.autograd import is_recomputed
from leanlift.layers.fused_glu import OurForward, may_be_replaced
from leanlift.layers.made_again import made_of
from leanlift.layers.untraced import untraced

Compute = Callable[[Any, Tensor], Tensor]


def use_kept_norms(model: nn.Module) -> list[str]:
    """Let every norm that treats each row alone keep its input alone, in place;
    `fused_glu.use_stock_glu` gives it its own forward again.

    Returns:
        The names of the modules that do.
    """
    found = []
    for name, module in model.named_modules():
        if "forward" not in vars(module) and is_norm(module):
            computes_by(module, as_it_does)
            found.append(name)
    return found


def computes_by(norm: nn.Module, compute: Compute) -> None:
    """Let a norm compute y [..., n] of x [..., n] so, and keep x alone."""
    norm.forward = OurForward(_forward, norm, compute)


def is_as_it_was(norm: nn.Module) -> bool:
    """Whether a norm computes as its class does."""
    given = vars(norm).get("forward")
    return may_be_replaced(norm) and (given is None or as_it_does in given.args)


def as_it_does(norm: Any, x: Tensor) -> Tensor:
    """y as the norm's class computes it."""
    y: Tensor = type(norm).forward(norm, x)
    return y


def _forward(norm: Any, compute: Compute, *given: Any, **named: Any) -> Any:
    if len(given) != 1 or named or (compute is as_it_does and torch.compiler.is_compiling()):
        return type(norm).forward(norm, *given, **named)
    return _computed(norm, compute, *given)


@untraced
def _computed(norm: Any, compute: Compute, x: Tensor) -> Tensor:
    frozen = not any(each.requires_grad for each in norm.parameters())
    if not (torch.is_grad_enabled() and x.requires_grad and frozen):
        return compute(norm, x)
    if is_recomputed():
        return compute(norm, x.view_as(x))  # which x gets one gradient of, as below
    return made_of(partial(_as_then, norm, compute, _state(norm)), (x,))


def _as_then(norm: Any, compute: Compute, then: list[Any], x: Tensor) -> Tensor:
    """y, of a norm that is as it was.

    Raises:
        RuntimeError: it has other parameters, or they were written to.
    """
    if not all(map(_is_same, then, _state(norm))):
        raise RuntimeError(
            f"a parameter of a {type(norm).__name__} changed between its forward and its backward "
            "pass, which computes it again: change frozen weights only when no backward is pending"
        )
    return compute(norm, x)


def _state(norm: nn.Module) -> list[Any]:
    """Its parameters, and what changes when they do."""
    return [(p, p.dtype, 0 if p.is_inference() else p._version) for p in norm.parameters()]


def _is_same(one: Any, other: Any) -> bool:
    return one[0] is other[0] and one[1:] == other[1:]


# --- which norms ------------------------------------------------------------------------------


def is_norm(module: nn.Module) -> bool:
    """Whether a module looks like a norm over the last dimension, of a class that is one."""
    kind: Any = type(module)
    plain = not [*module.children(), *module.buffers()]
    sizes = {tuple(each.shape) for each in module.parameters()}
    flat = all(len(size) == 1 for size in sizes) and len(sizes) <= 1
    return plain and flat and "Norm" in kind.__name__ and _is_row_wise(kind)


@cache
def _is_row_wise(kind: Any) -> bool:
    """Whether a class of norms, made with a width alone, gives each row the same when it is alone;
    tried on numbers."""
    try:
        with _disable_current_modes(), torch.random.fork_rng([]), torch.no_grad():
            norm = kind(8).to("cpu")
            rows = torch.linspace(-2, 3, 40, device="cpu").square().view(5, 8)
            whole = norm(rows)
            alone = torch.cat([norm(rows[i : i + 1]) for i in range(5)])
            return whole.shape == rows.shape and bool(torch.allclose(whole, alone))
    except Exception:  # it is made or called in another way
        return False
