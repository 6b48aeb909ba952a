"""The two autograd functions of a layer; see `leanlift.layers`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from leanlift.layers.once import once
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

    def product(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """y of x, in its dtype, with a weight that was made for it, or one that is made anew."""

    def product_back(self, grad_y: Tensor, weight: Tensor | None = None) -> Tensor:
        """The gradient of x of that of y, in its dtype, likewise."""

    def lasting_weight(self, dtype: torch.dtype) -> Tensor | None:
        """A weight for both products that stays when others are made; None: there is none."""


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
    @once
    def backward(ctx: Any, grad_y: Tensor) -> tuple[None, Tensor | None, None, None]:
        (x,) = ctx.saved_tensors
        layer: Layer = ctx.layer
        with layer.workspace.without_offsets(False):
            check_unchanged(layer, ctx.version)
        grad_y = grad_y.reshape(-1, layer.out_features).to(x.dtype)
        return None, ctx.consume(x.reshape(-1, layer.in_features), grad_y), None, None


class Multiply(torch.autograd.Function):
    """y = x W_eff^T + bias. Keeps nothing: W_eff is rebuilt for the gradient of x.

    One that was made to compute y again may wait for it: that comes soon after, but is the backward
    pass of another call of `forward`, so the workspace has what waits.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, carrier: Tensor | None, layer: Layer) -> Tensor:
        ctx.layer, ctx.version, ctx.dtype = layer, layer.version, x.dtype
        ctx.is_off = layer.workspace.is_off
        if not layer.workspace.reuses_weights:
            return layer.product(x)
        weight, waiting = None, layer.workspace.waiting
        if not in_backward_pass():
            waiting.clear()  # of a pass that did not end
        elif ctx.needs_input_grad[0]:
            weight = layer.lasting_weight(x.dtype)
            if weight is not None:
                waiting[id(layer), ctx.is_off, x.dtype] = weight
        return layer.product(x, weight)

    @staticmethod
    @once
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_x = None
        with ctx.layer.workspace.without_offsets(ctx.is_off):
            check_unchanged(ctx.layer, ctx.version)
            if ctx.needs_input_grad[0]:
                key = id(ctx.layer), ctx.is_off, ctx.dtype
                weight = ctx.layer.workspace.waiting.pop(key, None)
                grad_x = ctx.layer.product_back(grad_y.to(ctx.dtype), weight)
        return grad_x, grad_y if ctx.needs_input_grad[1] else None, None


def graph_task() -> int:
    """The number of the pass in which autograd goes backward in this thread; -1: in none."""
    return torch._C._current_graph_task_id()


def in_backward_pass() -> bool:
    """Whether autograd is going backward in this thread: what is computed then is computed again.
    `torch.utils.checkpoint` asks the same."""
    return graph_task() != -1


def is_recomputed() -> bool:
    """Whether what is computed now has been, or will be, computed in a backward pass too."""
    keeper = _keeper()
    return in_backward_pass() or getattr(keeper, "__module__", "") == "torch.utils.checkpoint"


def check_unchanged(layer: Layer, version: tuple[float, ...]) -> None:
    """Nothing of the weight is saved for backward, so nobody else would notice a change."""
    if layer.version != version:
        raise RuntimeError(
            "the offsets of a leanlift layer changed between its forward and its backward pass: "
            "step the optimizer, load adapters and refresh masks only when no backward is pending"
        )


CARRIER = "leanlift_carrier"
Carrier = Callable[[Tensor, Layer], Tensor]


class _Mark(tuple[Any, ...]):
    """What a tensor carries, which is not saved with it."""

    def __reduce__(self) -> Any:
        return _Mark, ((None, 0, None),)


def carry(x: Tensor, carrier: Carrier) -> None:
    """Let the carriers of x, of each layer that takes it, be made so, by whoever made x and keeps
    it in another form."""
    setattr(x, CARRIER, _Mark((carrier, x._version, _keeper())))


def carrier_of(x: Tensor, layer: Layer) -> Tensor | None:
    """The carrier of x for a layer; None: the layer has to keep x itself, as where x was written to
    since, or is recomputed apart from the layer: what is recomputed has to keep as much again."""
    carrier, version, keeper = getattr(x, CARRIER, (None, 0, None))
    if carrier is None or x._version != version or keeper is not _keeper():
        return None
    return carrier(x, layer)  # type: ignore[no-any-return]


def _keeper() -> Any:
    """What is told of the tensors that are kept now, as a block that is recomputed is; None:
    nothing is."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[0]
