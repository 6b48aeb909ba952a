"""Norms that go over the tokens of a long row in pieces.

A norm in 16 bits computes in fp32. Written as a handful of operations it keeps its input in that
width, and its backward pass has half a dozen such tensors at once, each twice as wide as anything
else outside of an MLP: once MLPs go in pieces they are what a long step peaks at. Each token has a
result of its own, so a norm can go in pieces too, keeping its input alone, and computes each piece
once more in the backward pass. Every number is the same, to the bit.

Taken are frozen norms as `kept_norms` has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from leanlift.layers.again import Autocast, kept_here, leaf_of
from leanlift.layers.kept_norms import as_it_does, computes_by, is_as_it_was, is_norm
from leanlift.layers.once import once
from leanlift.tiles import few_of, row_ranges, tile_rows

PIECE_BYTES = 16 * 2**20
"""Of fp32 numbers that a norm goes over at once."""


def use_tiled_norms(model: nn.Module) -> list[str]:
    """Let every norm that can go over its rows in pieces, in place, if it does not compute by a
    kernel; `fused_glu.use_stock_glu` gives it its own forward again.

    Returns:
        The names of the modules that do.
    """
    found = []
    for name, module in model.named_modules():
        if is_as_it_was(module) and is_norm(module):
            computes_by(module, _computed)
            found.append(name)
    return found


def _computed(norm: Any, x: Tensor) -> Tensor:
    rows, n = x.shape[:-1].numel(), x.shape[-1]
    trained = any(each.requires_grad for each in norm.parameters())
    is_over = all(each.shape == (n,) for each in norm.parameters())
    if rows <= tile_rows(n, 4, PIECE_BYTES) or trained or not is_over:
        return as_it_does(norm, x)
    y: Tensor = InPieces.apply(x, norm)
    return y


class InPieces(torch.autograd.Function):
    """y [..., n] of x [..., n], each row alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Any) -> Tensor:
        ctx.norm, ctx.autocast = norm, Autocast.of(x)
        ctx.save_for_backward(x)
        y = None
        for start, stop, piece in _pieces(x):
            part = as_it_does(norm, piece)
            if y is None:  # in order, also where x is turned, as heads are
                y = torch.empty(x.shape, dtype=part.dtype, device=x.device)
            y.view(-1, x.shape[-1])[start:stop] = part
            del part, piece  # before the next one is made
        assert y is not None
        return y

    @staticmethod
    @once
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        grads = grad_y.reshape(-1, x.shape[-1])
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        into = grad_x.view(grads.shape)
        with ctx.autocast.again():
            for start, stop, piece in _pieces(x):
                piece, seen = leaf_of(piece)
                with torch.enable_grad(), kept_here():
                    part = as_it_does(ctx.norm, seen)
                (into[start:stop],) = torch.autograd.grad(part, piece, grads[start:stop])
                del part, piece, seen
        return grad_x, None


def _pieces(x: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    flat = x.reshape(-1, x.shape[-1])
    ranges = [*row_ranges(flat.shape[0], tile_rows(x.shape[-1], 4, PIECE_BYTES))]
    for start, stop in few_of(ranges, x):
        yield start, stop, flat[start:stop]
