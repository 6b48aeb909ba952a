"""What stands beside leanlift in the benchmarks is what users of it would train."""

from __future__ import annotations

import sys
from types import MethodType, ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

from benchmarks import liger
from benchmarks.peers import _random_mask, llama, lora, nf4_llama, super_tuning, trained
from benchmarks.trainee import Scale, Trainee, lifted

pytest.importorskip("peft")
CPU = torch.device("cpu")


def test_peft_s_masks_are_drawn_where_the_layer_is() -> None:
    mask = _random_mask(nn.Linear(48, 32), 3)
    assert mask.shape == (32, 48)
    assert mask.sum() == 3 * (32 + 48)
    assert set(mask.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_adapters_are_in_the_dtype_that_is_asked_for(dtype: torch.dtype | None) -> None:
    model = nf4_llama(llama(128, 1, 64), CPU, torch.bfloat16)
    assert model.config._attn_implementation == "sdpa"
    parameters = trained(lora(model, 4, dtype))
    assert len(parameters) == 2 * 7
    assert {p.dtype for p in parameters} == {dtype or torch.bfloat16}


def test_super_tuning_trains_the_largest_entries_of_a_16_bit_base() -> None:
    supertuning = pytest.importorskip("peft.tuners.supertuning")
    assert supertuning is not None
    model = nf4_llama(llama(128, 1, 64), CPU, torch.bfloat16, quantized=False)
    weights = {n: p.numel() for n, p in model.named_parameters() if n.endswith("proj.weight")}
    assert {model.get_parameter(name).dtype for name in weights} == {torch.bfloat16}
    model = super_tuning(model, 0.05)
    assert sum(p.numel() for p in trained(model)) == sum(int(0.05 * k) for k in weights.values())


fused_calls: list[str] = []


@pytest.fixture
def made_up_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """`liger_kernel` with its function for Llama, which replaces what the real one does."""
    stock_rotary, stock_norm = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRMSNorm

    def rotary(*arguments: Any) -> Any:
        fused_calls.append("rope")
        return stock_rotary(*arguments)

    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        fused_calls.append("norm")
        return stock_norm.forward(self, x)

    def glu(self: Any, x: torch.Tensor) -> torch.Tensor:
        fused_calls.append("glu")
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    def apply(cross_entropy: bool, fused_linear_cross_entropy: bool, model: Any) -> None:
        assert not cross_entropy
        assert not fused_linear_cross_entropy
        modeling_llama.apply_rotary_pos_emb = rotary
        modeling_llama.LlamaMLP = modeling_llama.LlamaRMSNorm = nn.Identity  # type: ignore[misc]
        for layer in model.model.layers:
            layer.mlp.forward = MethodType(glu, layer.mlp)
            layer.input_layernorm.forward = MethodType(norm, layer.input_layernorm)

    package, inner = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    inner.apply_liger_kernel_to_llama = apply  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", inner)
    fused_calls.clear()


def test_liger_s_kernels_are_there_for_a_while(made_up_liger: None) -> None:
    scale = Scale(CPU, small=True)
    trainee = Trainee(scale, lambda: lifted(scale, "default", "magnitude"))
    parts = {name: getattr(modeling_llama, name) for name in liger.PATCHED}
    layer = trainee.model.get_submodule(
        next(name for name, m in trainee.model.named_modules() if name.endswith("layers.0"))
    )
    before = layer.mlp.forward, layer.input_layernorm.forward
    with liger.fused(trainee.model):
        trainee.once()
    assert {*fused_calls} == {"rope", "norm", "glu"}
    fused_calls.clear()
    trainee.once()
    assert fused_calls == []
    assert {name: getattr(modeling_llama, name) for name in liger.PATCHED} == parts
    assert (layer.mlp.forward, layer.input_layernorm.forward) == before


def test_without_liger_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ImportError, match="liger_kernel"), liger.fused(nn.Identity()):
        raise AssertionError
