"""The backward pass's product where a CPU has none in 16 bits: the same numbers, another way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from leanlift.layers import FrozenLinear, Workspace, back_product
from leanlift.layers.back_product import times_weight
from leanlift.measure import LiveBytes
from leanlift.weights.quantized import WeightDense


@pytest.mark.parametrize("has", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(5, 96), (2, 3, 96), (96,), (0, 96)])
def test_it_is_the_product(
    shape: tuple[int, ...], dtype: torch.dtype, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(back_product, "has_products", lambda dtype: has)
    grad_y, weight = torch.randn(shape).to(dtype), torch.randn(96, 40).to(dtype)
    if grad_y.ndim == 3:
        grad_y = grad_y.transpose(0, 1)  # not in rows
    found = times_weight(grad_y, weight, on_cpu=True)
    assert found.is_contiguous() or has
    assert found.dtype == dtype
    assert found.shape == (*grad_y.shape[:-1], 40)
    wanted = grad_y.double() @ weight.double()
    bound = 2 * torch.finfo(dtype).eps * (grad_y.double().abs() @ weight.double().abs())
    assert ((found.double() - wanted).abs() <= bound).all()


def test_it_takes_one_more_of_the_small_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(back_product, "has_products", lambda dtype: False)
    grad_y, weight = torch.randn(64, 128).bfloat16(), torch.randn(128, 256).bfloat16()
    with LiveBytes() as live:
        times_weight(grad_y, weight, on_cpu=True)
    assert live.peak <= 2 * 2 * 64 * 256


def test_a_gpu_and_its_plan_multiply_as_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(back_product, "has_products", lambda dtype: False)
    grad_y, weight = torch.randn(4, 8).bfloat16(), torch.randn(8, 6).bfloat16()
    assert torch.equal(times_weight(grad_y, weight, on_cpu=False), grad_y @ weight)


def test_a_brought_linear_multiplies_as_the_stock_one_that_it_stands_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A base that is streamed is the same model to the bit, whatever this CPU multiplies with."""
    monkeypatch.setattr("leanlift.layers.frozen.times_weight", lambda *_: pytest.fail("turned"))
    linear = nn.Linear(48, 96, bias=False, dtype=torch.bfloat16)
    brought = FrozenLinear(linear, WeightDense(linear), Workspace())
    x, grad_y = torch.randn(2, 64, 48).bfloat16(), torch.randn(2, 64, 96).bfloat16()
    gradients = []
    for module in (linear, brought):
        given = x.clone().requires_grad_()
        module(given).backward(grad_y)
        gradients.append(given.grad)
    assert torch.equal(*gradients)
