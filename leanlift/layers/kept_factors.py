"""The last Linear of a gated MLP, for whose sake its input is not kept.

h = act(gate) * up is what that Linear multiplies. The gradient of its values needs h, that of the
product gate and up: three tensors of the widest size, one of which is made of the others. So gate
and up are kept, once for both, and h is made again when its gradient comes: in a block that is not
recomputed a seventh of what is kept. In one that is recomputed h has just been made, and waits.

    h       = KeepFactors(gate, up)       keeps gate and up
    carrier = FromFactors(values, …, h)   keeps nothing: it asks the node of h
    y       = Multiply(h, carrier)        keeps nothing

Backward, autograd goes the other way: the gradient of the values is formed, and what came from y is
gone, before those of gate and up are. The results are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from leanlift.layers.again import Autocast, kept_here, leaf_of
from leanlift.layers.autograd import carry, in_backward_pass
from leanlift.layers.lift import LiftLinear

Act = Callable[[Tensor], Tensor]
Glu = Callable[[Tensor, Tensor, Act], Tensor]


def last_input(last: nn.Module, gate: Tensor, up: Tensor, act: Act, glu: Glu) -> Tensor:
    """h, `glu(gate, up, act)`, for the last Linear of a gated MLP and nobody else.

    The factors are to be held by nobody when it is multiplied.
    """
    if isinstance(last, LiftLinear) and _is_kept_for(last, gate, up):
        last.bring()
        h = KeepFactors.apply(gate, up, last, act, glu)
        carry(h, last, partial(_carrier, last, h.grad_fn))
    else:
        h = glu(gate, up, act)
    return h  # type: ignore[no-any-return]


def _carrier(last: LiftLinear, node: Any, h: Tensor) -> Tensor:
    carrier: Tensor = FromFactors.apply(last.values, h.detach(), last, node)
    return carrier


def _is_kept_for(last: LiftLinear, gate: Tensor, up: Tensor) -> bool:
    """Whether h would be kept, as it is, for the values' gradient, and gate and up for theirs."""
    trains = torch.is_grad_enabled() and last.observer is None and last.trains_now
    dtype = Autocast.of(gate).computed(gate.dtype)
    return trains and gate.requires_grad and up.requires_grad and gate.dtype == up.dtype == dtype


class KeepFactors(torch.autograd.Function):
    """h [..., n] of its factors, which are kept."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, layer: LiftLinear, act: Act, glu: Glu
    ) -> Tensor:
        ctx.layer, ctx.act, ctx.glu, ctx.made = layer, act, glu, None
        ctx.save_for_backward(gate, up)
        if not in_backward_pass():
            return glu(gate, up, act)
        made = _made(gate, up, act, glu)
        layer.workspace.products[id(layer)] = made
        return made.product.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor) -> tuple[Any, ...]:
        made, ctx.made = ctx.made or _made_again(ctx), None
        edge, factors = made.edge, made.factors
        del made  # and h, before gradients of its size are made
        return *torch.autograd.grad([edge], factors, [grad_h]), None, None, None


class FromFactors(torch.autograd.Function):
    """The carrier of a product with h; backward, the gradient of the layer's values. That nothing
    of the layer has changed is seen to by the product."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, h: Tensor, layer: LiftLinear, node: Any) -> Tensor:
        ctx.layer, ctx.node = layer, node
        return h.new_empty(1).expand(*h.shape[:-1], layer.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None, None]:
        layer: LiftLinear = ctx.layer
        made = _made_again(ctx.node)
        h = made.product.reshape(-1, layer.in_features)
        grad_y = grad_y.reshape(-1, layer.out_features).to(h.dtype)
        gradient = layer.values_gradient(h, grad_y)
        ctx.node.made = made._replace(product=h.new_empty(0))
        return gradient, None, None, None


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
    (gate, seen_gate), (up, seen_up) = leaf_of(gate), leaf_of(up)
    with torch.enable_grad(), kept_here():
        h = glu(seen_gate, seen_up, act)
    return _Made((gate, up), h.detach(), get_gradient_edge(h))


def _made_again(node: Any) -> _Made:
    """h of the factors that a node of `KeepFactors` keeps: what waits for it, or one made now where
    that is of other factors, as a pass that did not end leaves it. To be asked once in a pass: what
    is recomputed can be asked for once."""
    gate, up = node.saved_tensors
    made: _Made | None = node.layer.workspace.products.pop(id(node.layer), None)
    if made is None or not _is_same(made.factors[0], gate):
        made = _made(gate, up, node.act, node.glu)
    return made


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors that are there are the same memory; fake ones too."""
    places = ((x.untyped_storage()._cdata, x.storage_offset()) for x in (one, other))
    return len({*places}) == 1
