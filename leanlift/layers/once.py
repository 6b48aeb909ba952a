"""Backward passes that nobody can go through again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The `backward` of an autograd function that has no second derivative, refused where one is
    asked for. torch's `once_differentiable` alone refuses where the gradient that comes in has a
    graph; a penalty on the gradient of a sum has none there, and would be left out of its gradient.

    Raises:
        RuntimeError: autograd is to keep a graph of the backward pass.
    """
    first: Callable[..., Any] = once_differentiable(backward)

    @functools.wraps(backward)
    def call(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():  # as it is in a backward pass with create_graph alone
            raise RuntimeError(
                "the layers of leanlift have no second derivative: go backward without create_graph"
            )
        return first(ctx, *gradients)

    return call
