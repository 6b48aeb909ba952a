"""The gated product is the stock MLP's, bit for bit, and keeps less."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, config_of
from helpers import saved_nbytes
from transformers import AutoModelForCausalLM

from leanlift.layers.fused_glu import TOKENS, fused_glu, use_fused_glu
from leanlift.measure import LiveBytes
from leanlift.plan.fake import fake_tensors

OTHERS = ("fused", "turned", "experts")
OF_THE_KIND = [name for name in FAMILIES if not any(word in name for word in OTHERS)]


def build(family: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(family), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", OF_THE_KIND)
def test_outputs_and_gradients_are_the_stock_ones(family: str, dtype: torch.dtype) -> None:
    stock, ours = build(family, dtype), build(family, dtype)
    assert len(use_fused_glu(ours)) == 2
    ids = torch.randint(64, (3, 150))
    for model in (stock, ours):
        model(input_ids=ids, labels=ids).loss.backward()
    for (name, one), other in zip(stock.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


def test_another_mlp_is_left_alone() -> None:
    assert use_fused_glu(build("phi3, fused", torch.float32)) == []


def test_two_tensors_less_are_alive() -> None:
    stock = build("llama", torch.float32).model.layers[0].mlp
    ours = build("llama", torch.float32).model.layers[0]
    use_fused_glu(ours)
    x = torch.randn(4000, 64, requires_grad=True)
    wide = 4000 * 192 * 4
    assert saved_nbytes(stock, x) - saved_nbytes(ours.mlp, x) >= wide
    peaks = []
    for mlp in (stock.requires_grad_(False), ours.mlp.requires_grad_(False)):
        with LiveBytes() as live:
            mlp(x).sum().backward()
        peaks.append(live.peak)
    assert peaks[0] - peaks[1] >= 0.8 * wide


@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_a_plan_has_the_peak_of_all_pieces(pieces: int) -> None:
    """Though it goes over the first two alone."""

    def peak() -> int:
        gate, up = (torch.ones(pieces * TOKENS - 3, 16, requires_grad=True) for _ in range(2))
        with LiveBytes() as live:
            fused_glu(gate, up, torch.nn.functional.gelu).sum().backward()
        return live.peak

    real = peak()
    with fake_tensors():
        assert peak() == real
