"""Norms that go over the tokens of a long row in pieces.

A norm in 16 bits computes in fp32. Written as a handful of operations it keeps its input in that
width, and its backward pass has half a dozen such tensors at once, each twice as wide as anything
else outside of an MLP: once MLPs go in pieces they are what a long step peaks at. Each token has a
result of its own, so a norm can go in pieces too, keeping its input alone, and computes each piece
once more in the backward pass. Every number is the same, to the bit.

Taken are frozen norms over the last dimension whose class, tried on numbers, treats each row alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _disable_current_modes

from leanlift.layers.again import Autocast, kept_here, leaf_of
from leanlift.layers.fused_glu import OurForward
from leanlift.layers.untraced import untraced
from leanlift.tiles import few_of, row_ranges, tile_rows

PIECE_BYTES = 16 * 2**20
"""Of fp32 numbers that a norm goes over at once."""


def use_tiled_norms(model: nn.Module) -> list[str]:
    """Let every norm that can go over its rows in pieces, in place; `fused_glu.use_stock_glu` gives
    it its own forward again.

    Returns:
        The names of the modules that do.
    """
    found = []
    for name, module in model.named_modules():
        if "forward" not in vars(module) and _is_norm(module):
            module.forward = OurForward(_forward, module)
            found.append(name)
    return found


@untraced
def _forward(norm: Any, x: Tensor) -> Tensor:
    own = type(norm).forward
    rows, n = x.shape[:-1].numel(), x.shape[-1]
    trained = any(each.requires_grad for each in norm.parameters())
    y: Tensor
    if rows <= tile_rows(n, 4, PIECE_BYTES) or trained or not _is_over(norm, n):
        y = own(norm, x)
    else:
        y = InPieces.apply(x, norm, own)
    return y


class InPieces(torch.autograd.Function):
    """y [..., n] of x [..., n], each row alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Any, own: Callable[[Any, Tensor], Tensor]) -> Tensor:
        ctx.norm, ctx.own, ctx.autocast = norm, own, Autocast.of(x)
        ctx.save_for_backward(x)
        y = None
        for start, stop, piece in _pieces(x):
            part = own(norm, piece)
            if y is None:  # in order, also where x is turned, as heads are
                y = torch.empty(x.shape, dtype=part.dtype, device=x.device)
            y.view(-1, x.shape[-1])[start:stop] = part
            del part, piece  # before the next one is made
        assert y is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        grads = grad_y.reshape(-1, x.shape[-1])
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        into = grad_x.view(grads.shape)
        with ctx.autocast.again():
            for start, stop, piece in _pieces(x):
                piece, seen = leaf_of(piece)
                with torch.enable_grad(), kept_here():
                    part = ctx.own(ctx.norm, seen)
                (into[start:stop],) = torch.autograd.grad(part, piece, grads[start:stop])
                del part, piece, seen
        return grad_x, None, None


def _pieces(x: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    flat = x.reshape(-1, x.shape[-1])
    ranges = [*row_ranges(flat.shape[0], tile_rows(x.shape[-1], 4, PIECE_BYTES))]
    for start, stop in few_of(ranges, x):
        yield start, stop, flat[start:stop]


# --- which norms ------------------------------------------------------------------------------


def _is_norm(module: nn.Module) -> bool:
    """Whether a module looks like a norm over the last dimension, of a class that is one."""
    kind: Any = type(module)
    plain = not [*module.children(), *module.buffers()]
    sizes = {tuple(each.shape) for each in module.parameters()}
    flat = all(len(size) == 1 for size in sizes) and len(sizes) <= 1
    return plain and flat and "Norm" in kind.__name__ and _is_row_wise(kind)


def _is_over(norm: nn.Module, n: int) -> bool:
    """Whether it goes over rows of n numbers."""
    return all(each.shape == (n,) for each in norm.parameters())


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
