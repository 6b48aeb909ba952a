"""Norms in pieces: the own ones to the bit, of which the input alone is kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES, config_of
from helpers import saved_nbytes
from sweeps import swept
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from leanlift.layers.fused_elementwise import use_fused_elementwise
from leanlift.layers.fused_glu import use_stock_glu
from leanlift.layers.kept_norms import use_kept_norms
from leanlift.layers.tiled_norms import use_tiled_norms
from leanlift.measure import LiveBytes

PIECE = 64


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanlift.layers.tiled_norms.PIECE_BYTES", PIECE * 64 * 4)


def model_of(family: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family), dtype=dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:
            parameter.data.uniform_(0.5, 1.5)
    return model.requires_grad_(False)


def passed(norm: Any, x: Tensor, grad_y: Tensor, autocast: bool) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = norm(x)
    return y.detach(), torch.autograd.grad(y, x, grad_y.to(y.dtype))[0]


@pytest.mark.parametrize("autocast", swept([False, True], False))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", swept(list(FAMILIES), "llama", "gemma2", "gpt2, turned"))
def test_numbers_are_the_own_ones(family: str, dtype: torch.dtype, autocast: bool) -> None:
    model = model_of(family, dtype)
    stock = copy.deepcopy(model)
    names = use_tiled_norms(model)
    of_blocks = [name for name in names if name.count(".") > 1]
    assert len(names) >= 5
    assert len(of_blocks) == 2 * (len(of_blocks) // 2)
    for name in names:
        norm, own = model.get_submodule(name), stock.get_submodule(name)
        n = next(iter(norm.parameters())).shape[0]
        for shape in ((2, 133, n), (2, 5, 40, n), (2, 40, 5, n)):
            x, grad_y = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
            if shape[1] == 40:  # as heads, which some models turn before they norm them
                x, grad_y = x.transpose(1, 2), grad_y.transpose(1, 2)
            for got, wanted in zip(
                passed(norm, x, grad_y, autocast), passed(own, x, grad_y, autocast), strict=True
            ):
                assert torch.equal(got, wanted), name
                assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)


def test_the_input_is_kept_and_pieces_are_made() -> None:
    model = model_of("llama", torch.bfloat16)
    norm, x = model.model.norm, torch.randn(7000, 64, dtype=torch.bfloat16, requires_grad=True)

    grad_y = torch.randn_like(x)

    def peak() -> int:
        with LiveBytes() as live:
            norm(x).backward(grad_y)
        return live.peak

    whole = peak()
    assert saved_nbytes(norm, x) > 2 * x.nbytes
    use_tiled_norms(model)
    assert saved_nbytes(norm, x) == x.nbytes
    assert peak() < 2.3 * x.nbytes
    assert whole > 10 * x.nbytes


def test_short_rows_and_trained_norms_go_the_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama", torch.float32)
    use_tiled_norms(model)
    monkeypatch.setattr("leanlift.layers.tiled_norms.InPieces.apply", None)
    model.model.norm(torch.randn(1, PIECE, 64))
    with pytest.raises(TypeError):
        model.model.norm(torch.randn(1, PIECE + 1, 64))
    model.model.norm.weight.requires_grad_()
    model.model.norm(torch.randn(3, PIECE, 64)).sum().backward()
    assert model.model.norm.weight.grad.any()


def test_norms_by_a_kernel_are_left() -> None:
    model = model_of("llama", torch.float32)
    use_fused_elementwise(model)
    assert use_tiled_norms(model) == []
    use_stock_glu(model)
    assert len(use_kept_norms(model)) == len(use_tiled_norms(model)) == 5


def test_norms_that_look_at_other_rows_are_left_alone() -> None:
    class PairNorm(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(n))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * (x - x.mean(0))

    model = nn.ModuleList([PairNorm(8), nn.BatchNorm1d(8), nn.GroupNorm(2, 8), nn.LayerNorm(8)])
    assert use_tiled_norms(model) == ["3"]
    use_stock_glu(model)
    assert "forward" not in vars(model[3])
