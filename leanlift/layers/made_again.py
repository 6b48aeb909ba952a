"""Inputs of our layers that are not kept for the backward pass: they are made again.

What a layer multiplies, it needs once more for the gradient of its values. Where that was made of
tensors that are kept anyway, as the output of a norm is, or the product in a gated MLP, it is not
kept beside them, but made again when the first gradient asks for it. In a block that is recomputed
it has just been made, and waits.

    y       = KeepSources(sources)        keeps what y is made of
    carrier = FromSources(values, …, y)   of each layer that takes y; keeps nothing, asks y's node
    z       = Multiply(y, carrier)        keeps nothing

Backward, autograd goes the other way: the gradients of the values are formed, and what came from
the products is gone, before those of the sources are. The results are the same to the bit, but for
the order in which autograd adds what a source gets from several places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from leanlift.layers.again import Autocast, Waiting, kept_here, leaf_of
from leanlift.layers.autograd import carry, graph_task, in_backward_pass
from leanlift.layers.once import once

Make = Callable[..., Tensor]


def made_of(
    make: Make, sources: tuple[Tensor, ...], waiting: Waiting | None = None, key: Any = None
) -> Tensor:
    """y, `make(*sources)`, which our layers need not keep.

    Args:
        make: computes with its arguments alone and what is frozen; the same each time.
        sources: kept for the backward pass; each has a gradient.
        waiting: where y waits that a recomputation has made; None: nothing is recomputed here.
        key: of this place there.
    """
    y: Tensor = KeepSources.apply(make, Waiting() if waiting is None else waiting, key, *sources)
    carry(y, partial(_carrier, y.grad_fn))
    return y


def _carrier(node: Any, y: Tensor, layer: Any) -> Tensor:
    carrier: Tensor = FromSources.apply(layer.values, y.detach(), layer, node)
    return carrier


class KeepSources(torch.autograd.Function):
    """y of its sources, which are kept."""

    @staticmethod
    def forward(ctx: Any, make: Make, waiting: Waiting, key: Any, *sources: Tensor) -> Tensor:
        ctx.make, ctx.autocast, ctx.waiting, ctx.key = make, Autocast.of(sources[0]), waiting, key
        ctx.made, ctx.takers = None, 0
        ctx.save_for_backward(*sources)
        if not in_backward_pass():
            return make(*sources)
        made = waiting[key] = _made(ctx, sources)
        return made.product.detach()

    @staticmethod
    @once
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        made, ctx.made = _made_again(ctx), None
        edge, sources = made.edge, made.sources
        del made  # and y, before gradients of its size are made
        return None, None, None, *torch.autograd.grad([edge], sources, [grad_y])


class FromSources(torch.autograd.Function):
    """The carrier of a product with y; backward, the gradient of the layer's values. That nothing
    of the layer has changed is seen to by the product."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, y: Tensor, layer: Any, node: Any) -> Tensor:
        ctx.layer, ctx.node = layer, node
        node.takers += 1
        return y.new_empty(1).expand(*y.shape[:-1], layer.out_features)

    @staticmethod
    @once
    def backward(ctx: Any, grad_z: Tensor) -> tuple[Tensor, None, None, None]:
        layer, node = ctx.layer, ctx.node
        made = node.made = _made_again(node)
        y = made.product.reshape(-1, layer.in_features)
        grad_z = grad_z.reshape(-1, layer.out_features).to(y.dtype)
        gradient: Tensor = layer.values_gradient(y, grad_z)
        made.takers -= 1
        if made.takers == 0:
            made.product = y.new_empty(0)
        return gradient, None, None, None


@dataclass
class _Made:
    """y, made in a backward pass.

    Attributes:
        sources: leaves of a graph.
        product: y, without it; empty after the last layer has taken it.
        edge: from y into the graph, which does not hold y.
        takers: layers that are still to take it.
        task: the pass.
    """

    sources: tuple[Tensor, ...]
    product: Tensor
    edge: GradientEdge
    takers: int
    task: int


def _made(ctx: Any, sources: tuple[Tensor, ...]) -> _Made:
    leaves, seen = zip(*map(leaf_of, sources), strict=True)
    with torch.enable_grad(), kept_here(), ctx.autocast.again():
        y = ctx.make(*seen)
    return _Made(leaves, y.detach(), get_gradient_edge(y), 0, graph_task())


def _made_again(node: Any) -> _Made:
    """y of the sources that a node of `KeepSources` keeps: the one of this pass, one that waits for
    it, or one made now where that is of other sources, as a pass that did not end leaves it. The
    node is asked once in a pass: what is recomputed can be asked for once."""
    made: _Made | None = node.made
    if made is not None and made.task == graph_task():
        return made
    sources = node.saved_tensors
    made = node.waiting.pop(node.key, None)
    if made is None or not all(map(_is_same, made.sources, sources)):
        made = _made(node, sources)
    made.takers, made.task = node.takers, graph_task()
    return made


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors that are there are the same memory; fake ones too."""
    places = ((x.untyped_storage()._cdata, x.storage_offset()) for x in (one, other))
    return len({*places}) == 1
