"""The gated MLP of most models, act(gate) * up, with less kept for the backward pass.

Written as two operations, autograd keeps the activation's input and output and the other factor,
and its backward pass needs six tensors of the widest size at once: the peak of a lean training
step. As one operation it keeps the two factors, and needs nothing beside their gradients: where
torch has the activation's derivative as an operation it works in them, elsewhere autograd goes over
the tokens in pieces. The results are the same to the bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from leanlift.layers.again import leaf_of
from leanlift.layers.kept_factors import last_input
from leanlift.layers.once import once
from leanlift.layers.untraced import untraced
from leanlift.tiles import row_ranges

STOCK = "self.down_proj(self.act_fn(self.gate_proj(x))*self.up_proj(x))"
"""What a forward must consist of to be replaced, without spaces."""
SILU = "transformers.activations.SiLUActivation"
TOKENS = 256


class OurForward(partial):  # type: ignore[type-arg]
    """A forward of ours in the place of a module's own."""


def may_be_replaced(module: nn.Module) -> bool:
    """Whether a module's forward is its class's or one of ours: nobody else's."""
    given = vars(module).get("forward")
    return given is None or isinstance(given, OurForward)


def use_fused_glu(model: nn.Module) -> list[str]:
    """Let every MLP whose forward is the well-known one use `fused_glu`, in place.

    Returns:
        The names of the modules that do.
    """
    found = []
    for name, module in model.named_modules():
        if "forward" not in vars(module) and is_stock_glu(type(module).forward):
            module.forward = OurForward(_forward, module)
            found.append(name)
    return found


def use_stock_glu(model: nn.Module) -> None:
    """Give every MLP that has a forward of ours its own again."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), OurForward):
            del module.forward


def fused_glu(gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """act(gate) * up, both of one shape [..., d]; `act` works entry by entry."""
    product: Tensor = _FusedGlu.apply(gate, up, act)
    return product


@untraced
def _forward(self: Any, x: Tensor) -> Tensor:
    last = self.down_proj
    y: Tensor = last(last_input(last, self.gate_proj(x), self.up_proj(x), self.act_fn, fused_glu))
    return y


@cache
def is_stock_glu(forward: Callable[..., Any]) -> bool:
    """Whether a forward is that of the gated MLP of most models."""
    try:
        lines = inspect.getsource(forward).splitlines()
    except (OSError, TypeError):
        return False
    body = "".join("".join(lines[1:]).split())
    return body in (f"down_proj={STOCK}returndown_proj", f"return{STOCK}")


class _FusedGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return act(gate).mul_(up)

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = (saved.reshape(-1, saved.shape[-1]) for saved in ctx.saved_tensors)
        flat = grad.reshape(gate.shape)
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        gradients = _of_silu if _is_silu(ctx.act) else _by_autograd
        gradients(ctx.act, gate, up, flat, grad_gate, grad_up)
        return grad_gate.view(grad.shape), grad_up.view(grad.shape), None


def _is_silu(act: Callable[[Tensor], Tensor]) -> bool:
    """Whether `act` is SiLU and nothing else: torch's, or the one that transformers makes."""
    kind = type(act)
    return kind is nn.SiLU or f"{kind.__module__}.{kind.__name__}" == SILU


def _of_silu(
    act: Callable[[Tensor], Tensor],
    gate: Tensor,
    up: Tensor,
    grad: Tensor,
    grad_gate: Tensor,
    grad_up: Tensor,
) -> None:
    """Four launches, and no memory but the results'."""
    torch.ops.aten.silu.out(gate, out=grad_up).mul_(grad)
    torch.mul(grad, up, out=grad_gate)
    torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)


def _by_autograd(
    act: Callable[[Tensor], Tensor],
    gate: Tensor,
    up: Tensor,
    grad: Tensor,
    grad_gate: Tensor,
    grad_up: Tensor,
) -> None:
    """Any activation, some tokens at a time; of a plan's tensors, which have no numbers, the first
    two pieces, which take what all of them take."""
    most = 2 if isinstance(gate, FakeTensor) else None
    for a, b in islice(row_ranges(gate.shape[0], TOKENS), most):
        piece, seen = leaf_of(gate[a:b])
        with torch.enable_grad():
            activated = act(seen)
        torch.mul(grad[a:b], activated.detach(), out=grad_up[a:b])
        (grad_gate[a:b],) = torch.autograd.grad(activated, piece, grad[a:b] * up[a:b])
