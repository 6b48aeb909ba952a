"""Merging in memory, over every kind of matrix, and heads that the base has not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import MIXTURES, make_mixture
from tiny import load, make_checkpoint, make_checkpoint_of, quantization
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config
from transformers.pytorch_utils import Conv1D

from leanlift import LiftConfig, LiftModel, get_lift_model, save_adapter
from leanlift.model import lift_layers

IDS = torch.arange(3, 35).reshape(2, 16)


def attached(model: Any, **config: Any) -> LiftModel:
    made = get_lift_model(model, LiftConfig(density=0.1, approx_rank=8, **config), progress=False)
    generator = torch.Generator().manual_seed(3)
    for layer in lift_layers(made).values():
        layer.values.data.add_(0.05 * torch.randn(layer.values.shape, generator=generator))
    return made.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


def check(model: LiftModel, place: Path, kind: Any = AutoModelForCausalLM) -> Any:
    """Merge for good: the same logits, before and after stock transformers has saved it."""
    wanted = logits(model)
    with model.disable_adapter():
        assert not torch.equal(logits(model), wanted)
    stock = model.merge_and_unload()
    assert torch.allclose(logits(stock), wanted, atol=2e-5, rtol=1e-4)
    stock.save_pretrained(place)
    again = kind.from_pretrained(place, dtype=torch.float32)
    assert torch.allclose(logits(again), logits(stock), atol=1e-6)
    return stock


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("family", MIXTURES)
def test_experts(tmp_path: Path, family: str, kind: str) -> None:
    base = make_mixture(MIXTURES[family], tmp_path / "base")
    check(attached(load(base, kind)), tmp_path / "merged")


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_transposed_linears(tmp_path: Path, kind: str) -> None:
    config = GPT2Config(
        vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64, pad_token_id=0,
        bos_token_id=None, eos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    base = make_checkpoint_of(config, tmp_path / "base")
    stock = check(attached(load(base, kind)), tmp_path / "merged")
    assert type(stock.transformer.h[0].mlp.c_fc) is Conv1D


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_a_new_head_stays_when_the_adapter_is_off(tmp_path: Path, kind: str) -> None:
    base = make_checkpoint(tmp_path / "base", tied=False)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        base, quantization_config=quantization(kind), dtype=torch.float32, num_labels=3,
        pad_token_id=0,
    )  # fmt: skip
    lifted = attached(model, modules_to_save=("score",))
    head = lift_layers(lifted)["score"]
    with lifted.disable_adapter(), torch.no_grad():
        x = torch.randn(4, 64)
        weight = head.values.view(3, 64)
        assert torch.allclose(head(x), x @ weight.T, atol=1e-6)
    save_adapter(lifted, tmp_path / "adapter")
    again = LiftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(
            base, quantization_config=quantization(kind), dtype=torch.float32, num_labels=3,
            pad_token_id=0,
        ),
        tmp_path / "adapter",
    )  # fmt: skip
    assert torch.equal(logits(again), logits(lifted))
    with again.disable_adapter(), lifted.disable_adapter():
        assert torch.equal(logits(again), logits(lifted))
    check(lifted, tmp_path / "merged", AutoModelForSequenceClassification)
