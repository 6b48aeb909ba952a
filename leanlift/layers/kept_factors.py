"""The last Linear of a gated MLP, for whose sake its input is not kept.

h = act(gate) * up is what that Linear multiplies. The gradient of its values needs h, that of the
product gate and up: three tensors of the widest size, one of which is made of the others. So gate
and up are kept, once for both, and h is made again when its gradient comes: in a block that is not
recomputed a seventh of what is kept. In one that is recomputed h has just been made, and waits.

    h, carrier = KeepFactors(gate, up, values)   keeps gate and up
    y          = Multiply(h, carrier)            keeps nothing

The results are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from leanlift.layers.again import Autocast, kept_here
from leanlift.layers.autograd import carry, check_unchanged, in_backward_pass
from leanlift.layers.lift import LiftLinear

Act = Callable[[Tensor], Tensor]
Glu = Callable[[Tensor, Tensor, Act], Tensor]


def last_product(last: nn.Module, gate: Tensor, up: Tensor, act: Act, glu: Glu) -> Tensor:
    """What a gated MLP gives: its last Linear's product with `glu(gate, up, act)`."""
    if isinstance(last, LiftLinear) and _is_kept_for(last, gate, up):
        last.bring()
        h, carrier = KeepFactors.apply(gate, up, last.values, last, act, glu)
        carry(h, last, carrier)
    else:
        h = glu(gate, up, act)
    y: Tensor = last(h)
    return y


def _is_kept_for(last: LiftLinear, gate: Tensor, up: Tensor) -> bool:
    """Whether h would be kept, as it is, for the values' gradient, and gate and up for theirs."""
    trains = torch.is_grad_enabled() and last.observer is None and last.trains_now
    dtype = Autocast.of(gate).computed(gate.dtype)
    return trains and gate.requires_grad and up.requires_grad and gate.dtype == up.dtype == dtype


class KeepFactors(torch.autograd.Function):
    """Gives h [..., n] and the carrier to its product; keeps the factors of h."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, values: Tensor, layer: LiftLinear, act: Act, glu: Glu
    ) -> tuple[Tensor, Tensor]:
        ctx.layer, ctx.version, ctx.act, ctx.glu = layer, layer.version, act, glu
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gate, up)
        waiting = layer.workspace.products
        waiting.pop(id(layer), None)  # of a pass that did not end
        if in_backward_pass():
            waiting[id(layer)] = made = _made(gate, up, act, glu)
            h = made.product.detach()
        else:
            h = glu(gate, up, act)
        return h, h.new_empty(1).expand(*h.shape[:-1], layer.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor | None, grad_y: Tensor | None) -> tuple[Any, ...]:
        layer: LiftLinear = ctx.layer
        gate, up = ctx.saved_tensors
        with layer.workspace.without_offsets(False):
            check_unchanged(layer, ctx.version)
        made: _Made | None = layer.workspace.products.pop(id(layer), None)
        if made is None or not _is_same(made.factors[0], gate):
            made = _made(gate, up, ctx.act, ctx.glu)
        factors, h, edge = made
        del made
        of_values = None
        if grad_y is not None:
            grad_y = grad_y.reshape(-1, layer.out_features).to(h.dtype)
            of_values = layer.values_gradient(h.reshape(-1, layer.in_features), grad_y)
        del h  # before gradients of its size are made
        of_factors: tuple[Tensor | None, ...] = (None, None)
        if grad_h is not None:
            of_factors = torch.autograd.grad([edge], factors, [grad_h])
        return *of_factors, of_values, None, None, None


class _Made(NamedTuple):
    """h, made in a backward pass.

    Attributes:
        factors: leaves of a graph, gate and up.
        product: h, without it.
        edge: from h into the graph, which does not hold h.
    """

    factors: tuple[Tensor, Tensor]
    product: Tensor
    edge: GradientEdge


def _made(gate: Tensor, up: Tensor, act: Act, glu: Glu) -> _Made:
    factors = gate.detach().requires_grad_(), up.detach().requires_grad_()
    with torch.enable_grad(), kept_here():
        h = glu(*factors, act)
    return _Made(factors, h.detach(), get_gradient_edge(h))


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors that are there are the same memory; fake ones too."""
    places = ((x.untyped_storage()._cdata, x.storage_offset()) for x in (one, other))
    return len({*places}) == 1
