"""The two autograd functions of a layer; see `leanlift.layers`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leanlift.layers.workspace import Workspace


class Layer(Protocol):
    """What the functions need of a layer: products with a weight that is rebuilt for each use."""

    @property
    def in_features(self) -> int:
        """Of x."""

    @property
    def out_features(self) -> int:
        """Of y."""

    @property
    def workspace(self) -> Workspace:
        """Where it is known whether offsets are computed with."""

    @property
    def version(self) -> tuple[float, ...]:
        """Changes whenever the effective weight does."""

    def product(self, x: Tensor) -> Tensor:
        """y of x, in its dtype."""

    def product_back(self, grad_y: Tensor) -> Tensor:
        """The gradient of x of that of y, in its dtype."""


class KeepInput(torch.autograd.Function):
    """Keeps x for the backward pass; `consume(x, grad_y)` forms the gradient of `parameter`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        parameter: Tensor,
        layer: Layer,
        consume: Callable[[Tensor, Tensor], Tensor | None],
    ) -> Tensor:
        ctx.layer, ctx.version, ctx.consume = layer, layer.version, consume
        ctx.save_for_backward(x)
        return x.new_empty(1).expand(*x.shape[:-1], layer.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[None, Tensor | None, None, None]:
        (x,) = ctx.saved_tensors
        layer: Layer = ctx.layer
        with layer.workspace.without_offsets(False):
            check_unchanged(layer, ctx.version)
        grad_y = grad_y.reshape(-1, layer.out_features).to(x.dtype)
        return None, ctx.consume(x.reshape(-1, layer.in_features), grad_y), None, None


class Multiply(torch.autograd.Function):
    """y = x W_eff^T + bias. Keeps nothing: W_eff is rebuilt for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, carrier: Tensor | None, layer: Layer) -> Tensor:
        ctx.layer, ctx.version, ctx.dtype = layer, layer.version, x.dtype
        ctx.is_off = layer.workspace.is_off
        return layer.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_x = None
        with ctx.layer.workspace.without_offsets(ctx.is_off):
            check_unchanged(ctx.layer, ctx.version)
            if ctx.needs_input_grad[0]:
                grad_x = ctx.layer.product_back(grad_y.to(ctx.dtype))
        return grad_x, grad_y if ctx.needs_input_grad[1] else None, None


def check_unchanged(layer: Layer, version: tuple[float, ...]) -> None:
    """Nothing of the weight is saved for backward, so nobody else would notice a change."""
    if layer.version != version:
        raise RuntimeError(
            "the offsets of a leanlift layer changed between its forward and its backward pass: "
            "step the optimizer, load adapters and refresh masks only when no backward is pending"
        )
