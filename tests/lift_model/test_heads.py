"""Losses that multiply with the output head's weight themselves, as TRL's trainers do: they get the
weight that the head computes with, and what is trained of it gets its gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sweeps import swept
from tiny import load, make_checkpoint, quantization
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl.trainer.utils import add_fused_lm_head

from leanlift import LiftConfig, LiftModel, get_lift_model, reference_model, scale_adapter
from leanlift.model import lift_layers

IDS = torch.arange(3, 43).reshape(2, 20)
CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "tied": (True, {}),
    "tokens, tied": (True, {"trainable_token_indices": (5, 9, 30)}),
    "tokens, apart": (False, {"trainable_token_indices": (5, 9, 30)}),
    "trained whole": (False, {"modules_to_save": ("lm_head",)}),
    "INT8": (False, {"quantize_embeddings": True}),
    "INT8, tied": (True, {"quantize_embeddings": True}),
    "INT8, tied, tokens": (
        True,
        {"quantize_embeddings": True, "trainable_token_indices": (5, 9, 30)},
    ),
}


def attached(base: Path, kind: str, **config: Any) -> LiftModel:
    made = get_lift_model(load(base, kind), LiftConfig(approx_rank=8, **config), progress=False)
    generator = torch.Generator().manual_seed(3)
    for layer in lift_layers(made).values():
        layer.values.data.add_(0.05 * torch.randn(layer.values.shape, generator=generator))
    return made


def plainly(model: Any) -> torch.Tensor:
    """The log-probabilities of the next tokens, from whole logits."""
    scores = torch.log_softmax(model(IDS).logits.float()[:, :-1], -1)
    return scores.gather(-1, IDS[:, 1:, None]).squeeze(-1)


def gradients(model: Any, scores: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    scores.sum().backward()
    return {name: layer.values.grad for name, layer in lift_layers(model).items()}


def check(model: LiftModel) -> None:
    """TRL's fused head against whole logits: with the adapter, scaled, without, and as a reference
    of its own."""
    expected = plainly(model)
    wanted = gradients(model, expected)
    with model.disable_adapter():
        of_base = plainly(model)
    reference = reference_model(model)
    add_fused_lm_head(reference)
    add_fused_lm_head(model.get_base_model())

    def fused(one: Any) -> torch.Tensor:
        return one(IDS, labels=IDS, fused_lm_head=True).log_probs

    found = fused(model)
    assert torch.allclose(found, expected, atol=1e-5)
    for name, gradient in gradients(model, found).items():
        assert torch.allclose(gradient, wanted[name], atol=1e-5, rtol=1e-4), name
    scale_adapter(model, 0.5)
    assert torch.allclose(fused(model), plainly(model), atol=1e-5)
    with model.disable_adapter():
        assert torch.allclose(fused(model), of_base, atol=1e-5)
    assert torch.allclose(fused(reference), of_base, atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "dense"])
@pytest.mark.parametrize("case", CASES)
def test_a_fused_head_is_the_head(tmp_path: Path, case: str, kind: str) -> None:
    tied, config = CASES[case]
    check(attached(make_checkpoint(tmp_path / "base", tied=tied), kind, **config))


@pytest.mark.parametrize("whole", [False, True], ids=["frozen", "trained"])
def test_a_head_in_four_bits(tmp_path: Path, whole: bool) -> None:
    base = make_checkpoint(tmp_path / "base", tied=False)
    settings: dict[str, Any] = {**quantization("nf4").to_diff_dict(), "llm_int8_skip_modules": []}
    settings = {key: value for key, value in settings.items() if not key.startswith("quant_m")}
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(**settings), dtype=torch.float32
    )
    assert type(model.lm_head).__name__ == "Linear4bit"
    config = LiftConfig(approx_rank=8, modules_to_save=("lm_head",) if whole else ())
    made = get_lift_model(model, config, progress=False)
    for layer in lift_layers(made).values():
        layer.values.data.normal_(std=0.05)
    check(made)


@pytest.mark.parametrize("method", swept(["dpo", "kto", "grpo"], "dpo"))
@pytest.mark.parametrize("case", ["tokens, tied", "trained whole", "INT8"])
def test_trainers_train_it(tmp_path: Path, method: str, case: str) -> None:
    """From the first step on, beside a reference that has learned nothing."""
    from other_trainers import make

    tied, config = CASES[case]
    base = make_checkpoint(tmp_path / "base", tied=tied)
    made = get_lift_model(load(base, "nf4"), LiftConfig(approx_rank=8, **config), progress=False)
    trainer = make(method, made, tmp_path / "run", save_strategy="no", max_steps=2)
    trainer.train()
    first = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    assert first == pytest.approx({"dpo": 0.693147, "kto": 0.5, "grpo": 0.0}[method], abs=1e-5)
    layers = lift_layers(made)
    trained = [name for name in layers if "layers" not in name]
    assert len(trained) == (case != "INT8")
    assert all(bool(layers[name].values.any()) for name in trained)
