"""No second derivative of ours is left out: who asks for one is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import config_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from leanlift import LiftConfig, get_lift_model
from leanlift.layers.frozen_head import FrozenHead
from leanlift.layers.lm_head import Head, head_loss
from leanlift.layers.once import once
from leanlift.model import lifted, tiled_mlp
from leanlift.tiles import DenseTiles

WIDTH = 64


def block(in_pieces: bool = False) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of("llama")).requires_grad_(False)
    model = get_lift_model(model, LiftConfig(selector="random", density=0.1), progress=False)
    if in_pieces:
        tiled_mlp(model, 8)
    return lifted(model).model.layers[0]


def loss(x: Tensor) -> Tensor:
    labels = torch.arange(x.shape[0])
    return head_loss(x, labels, Head(DenseTiles(torch.randn(96, WIDTH))), 1).loss


PARTS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "a Linear": lambda: block().self_attn.q_proj,
    "a norm": lambda: block().input_layernorm,
    "a gated MLP": lambda: block().mlp,
    "an MLP in pieces": lambda: block(in_pieces=True).mlp,
    "a head": lambda: FrozenHead(nn.Linear(WIDTH, 96), DenseTiles(torch.randn(96, WIDTH))),
    "the loss": lambda: loss,
}


@pytest.mark.parametrize("part", PARTS)
def test_a_penalty_on_a_gradient_is_refused(part: str) -> None:
    x = torch.randn(20, WIDTH, requires_grad=True)
    y = PARTS[part]()(x).sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y, x, create_graph=True)
    (first,) = torch.autograd.grad(PARTS[part]()(x).sum(), x)
    assert not first.requires_grad


def test_a_gradient_that_comes_in_may_have_a_graph() -> None:
    """As where an outer function of autograd goes backward with its graph on, and ours does not."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        @once
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            return 2 * grad

    x = torch.ones(3, requires_grad=True)
    (found,) = torch.autograd.grad(Twice.apply(x), x, torch.ones(3, requires_grad=True))
    assert torch.equal(found, torch.full((3,), 2.0))
