"""MLPs that go over the tokens of a long row in pieces, forwards and backwards.

An MLP computes token by token, and is three to four times as wide inside as outside: of a long row
those tensors are the largest of a step. So it goes over the tokens in pieces, and keeps its input
alone. In the backward pass each piece is computed once more up to the last Linear, whose product
nobody needs, and gives its part of the gradients; those of the trained values are summed in fp32.

The work is split over two autograd functions, as that of a layer is (`leanlift.layers.autograd`),
so that activation checkpointing stops recomputing as soon as the input is there again:

    carrier = KeepInput(x, values, …)   keeps x; in backward goes over the pieces
    y       = Compute(carrier, x)       goes over the pieces; keeps nothing

What is the same as without: every number of the output, and the gradient of x, to the rounding of
products of fewer rows; the values' gradients to the order of a sum. What it costs: the weights are
made anew for each piece. Products are those of a checkpointed step; where activations are not
recomputed anyway, all Linears but the last are multiplied with once more. Rows of one piece, as
those of a generation, go the plain way.

Taken are MLPs whose forward is written in one of the well-known ways (`mlp_ways`). Experts are left
as they are: their tokens are split by their routes already.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from leanlift.errors import UserError
from leanlift.layers.again import Autocast, kept_here, leaf_of
from leanlift.layers.autograd import Multiply, check_unchanged
from leanlift.layers.frozen import FrozenLinear
from leanlift.layers.fused_glu import OurForward, fused_glu, may_be_replaced
from leanlift.layers.kept_factors import Glu
from leanlift.layers.lift import LiftLinear
from leanlift.layers.mlp_ways import Way, way_of
from leanlift.layers.once import once
from leanlift.layers.untraced import untraced
from leanlift.streaming import STREAMED
from leanlift.tiles import few_of, row_ranges

PIECES, LEAST, MOST = 4, 2048, 4096
"""A row is cut into four pieces, of no fewer than LEAST tokens and no more than MOST. An H100 takes
a quarter of the products' time to make the weights for 2048 tokens; for fewer, more than that."""


def use_tiled_mlp(model: nn.Module, tokens: int | None = None, glu: Glu = fused_glu) -> list[str]:
    """Let every MLP that can go over its tokens in pieces, in place; `fused_glu.use_stock_glu`
    gives it its own forward again.

    Args:
        model: whose Linears are the layers that compute: attached.
        tokens: of a piece, at most; None: see `pieces`.
        glu: what multiplies the factors of gated ones.

    Returns:
        The names of the modules that do.

    Raises:
        UserError: there is none.
    """
    found = []
    for name, module in model.named_modules():
        way = way_of(module, glu) if may_be_replaced(module) else None
        if way is not None:
            module.forward = OurForward(_forward, module, replace(way, tokens=tokens))
            found.append(name)
    if not found:
        raise UserError(
            f"no MLP of this {type(model).__name__} is written in a way that could go over its "
            "tokens in pieces: leave out tiled_mlp."
        )
    return found


def pieces(tokens: int, most: int | None = None) -> list[tuple[int, int]]:
    """The pieces of so many tokens, as even as can be: (start, stop).

    Args:
        tokens: of all rows.
        most: of a piece; None: a quarter of them, but no fewer than LEAST and no more than MOST.
    """
    most = most or min(MOST, max(LEAST, math.ceil(tokens / PIECES)))
    return list(row_ranges(tokens, math.ceil(tokens / math.ceil(tokens / most)) if tokens else 1))


# --- how they compute -------------------------------------------------------------------------


@untraced
def _forward(mlp: Any, way: Way, x: Tensor) -> Tensor:
    whole = len(pieces(x.shape[:-1].numel(), way.tokens)) <= 1
    if not way.is_exact(mlp) or (not whole and _trains_others(mlp)):
        y: Tensor = type(mlp).forward(mlp, x)
        return y
    if whole:
        return way(mlp, x)
    carrier = None
    if torch.is_grad_enabled():
        trained: list[Tensor] = [*_gradients_of(mlp)]
        if _is_observed(mlp):
            trained.append(torch.zeros((), device=x.device, requires_grad=True))
        carrier = KeepInput.apply(x, mlp, way, *trained)
    return Compute.apply(carrier, x.detach(), mlp, way)


def _layers(mlp: nn.Module) -> list[FrozenLinear]:
    return [module for module in mlp.modules() if isinstance(module, FrozenLinear)]


def _gradients_of(mlp: nn.Module) -> list[nn.Parameter]:
    """The values that get a gradient of a forward pass of now."""
    found = []
    for layer in _layers(mlp):
        if isinstance(layer, LiftLinear) and layer.trains_now and layer.observer is None:
            layer.bring()
            found.append(layer.values)
    return found


def _trains_others(mlp: nn.Module) -> bool:
    """Whether a parameter that is none of ours would need a gradient."""
    ours = {id(layer.values) for layer in _layers(mlp) if isinstance(layer, LiftLinear)}
    return any(each.requires_grad and id(each) not in ours for each in mlp.parameters())


def _is_observed(mlp: nn.Module) -> bool:
    return any(layer.observer is not None for layer in _layers(mlp))


class KeepInput(torch.autograd.Function):
    """Keeps x [..., n]; in backward goes over its pieces for all gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: Any, way: Way, *values: Tensor) -> Tensor:
        ctx.mlp, ctx.way = mlp, way
        ctx.values = tuple(each for each in values if isinstance(each, nn.Parameter))
        ctx.versions = [(layer, layer.version) for layer in _layers(mlp)]
        ctx.is_off = [(layer.workspace, layer.workspace.is_off) for layer, _ in ctx.versions]
        ctx.autocast = Autocast.of(x)
        ctx.save_for_backward(x)
        width, dtype = _width(getattr(mlp, way.last)), ctx.autocast.computed(x.dtype)
        return x.new_empty(1, dtype=dtype).expand(*x.shape[:-1], width)

    @staticmethod
    @once
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        sums: list[Tensor | None] = [None] * len(ctx.values)
        with _as_in_forward(ctx):
            for layer, version in ctx.versions:
                check_unchanged(layer, version)
            grad_x = _over_pieces(ctx, x, grad_y, sums)
        found = []
        for values in ctx.values:
            total = sums.pop(0)
            found.append(None if total is None else total.to(values.dtype))
            del total  # before the next one is made
        anchors = len(ctx.needs_input_grad) - 3 - len(found)
        return grad_x, None, None, *found, *[None] * anchors


def _over_pieces(ctx: Any, x: Tensor, grad_y: Tensor, sums: list[Tensor | None]) -> Tensor | None:
    """The gradient of x, piece by piece; those of the values are added to `sums`."""
    flat, grads = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])
    wanted = ctx.needs_input_grad[0]
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if wanted else None
    for start, stop in few_of(pieces(flat.shape[0], ctx.way.tokens), flat):
        piece = seen = flat[start:stop].detach()
        if wanted or _is_observed(ctx.mlp):
            piece, seen = leaf_of(piece)
        inputs = [piece, *ctx.values] if piece.requires_grad else ctx.values
        with torch.enable_grad(), kept_here():
            last = getattr(ctx.mlp, ctx.way.last)
            unseen = _without_product(last, ctx.way.inner(ctx.mlp, seen))
        del seen
        gradient = grads[start:stop].to(unseen.dtype)
        found = [*torch.autograd.grad(unseen, inputs, gradient, allow_unused=True)]
        del unseen, gradient
        of_piece = found.pop(0) if piece.requires_grad else None
        if grad_x is not None and of_piece is not None:
            grad_x.view(flat.shape)[start:stop] = of_piece
        del of_piece
        for at in range(len(sums)):
            _add(sums, at, found.pop(0))
    return grad_x


def _add(sums: list[Tensor | None], at: int, part: Tensor | None) -> None:
    """In fp32 at least: what is summed in fewer bits is lost where it is small."""
    total = sums[at]
    if part is None:
        return
    if total is None:
        sums[at] = part.to(torch.promote_types(part.dtype, torch.float32))
    else:
        total.add_(part)


@contextmanager
def _as_in_forward(ctx: Any) -> Iterator[None]:
    """Autocast, and whether there is an adapter, as they were."""
    with ExitStack() as stack:
        for workspace, is_off in {id(space): (space, off) for space, off in ctx.is_off}.values():
            stack.enter_context(workspace.without_offsets(is_off))
        stack.enter_context(ctx.autocast.again())
        yield


class Compute(torch.autograd.Function):
    """y, piece by piece. Its gradient is the carrier's."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor | None, x: Tensor, mlp: Any, way: Way) -> Tensor:
        flat, y = x.reshape(-1, x.shape[-1]), None
        for start, stop in few_of(pieces(flat.shape[0], way.tokens), flat):
            part = way(mlp, flat[start:stop])
            if y is None:
                y = part.new_empty(flat.shape[0], part.shape[-1])
            y[start:stop] = part
            del part  # before the next one is made
        assert y is not None
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None, None]:
        return grad_y, None, None, None


# --- the last Linear --------------------------------------------------------------------------


def _width(last: Any) -> int:
    """How wide its output is."""
    if hasattr(last, "out_features"):
        return int(last.out_features)
    return int(last.nf)


def _without_product(last: Any, x: Tensor) -> Tensor:
    """What stands for the output of a Linear where only its gradients are wanted."""
    if isinstance(last, FrozenLinear):
        x = last._checked(x)
        return Unseen.apply(x, last._carrier(x), last)
    if type(last) is nn.Linear and not hasattr(last.weight, STREAMED):
        return UnseenLinear.apply(x.to(Autocast.of(x).computed(x.dtype)), last.weight)
    y: Tensor = last(x)
    return y


class Unseen(Multiply):
    """`Multiply` without the product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, carrier: Tensor | None, layer: Any) -> Tensor:
        ctx.layer, ctx.version, ctx.dtype = layer, layer.version, x.dtype
        ctx.is_off = layer.workspace.is_off
        return x.new_empty(1).expand(*x.shape[:-1], layer.out_features)


class UnseenLinear(torch.autograd.Function):
    """The same of a plain frozen Linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        return x.new_empty(1).expand(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        return grad_y @ ctx.weight.to(ctx.dtype), None
