"""What could not be merged is found before it is trained; exact tensors of a base stay exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import load, make_checkpoint

from leanlift import LiftConfig, UserError, get_lift_model, merge_adapter, save_adapter
from leanlift.model import lift_layers

Tensors = dict[str, torch.Tensor]
TARGET = "model.layers.1.mlp.up_proj.weight"


def renamed(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"other.{name}"] = tensors.pop(name)

    return change


def transposed(tensors: Tensors) -> None:
    tensors[TARGET] = tensors[TARGET].T.contiguous()


def fused(tensors: Tensors) -> None:
    up = tensors.pop(TARGET)
    gate = tensors.pop(TARGET.replace("up_proj", "gate_proj"))
    tensors[TARGET.replace("up_proj", "gate_up_proj")] = torch.cat([gate, up])


HOMELESS = {
    "target": (renamed(TARGET), "could be trained but not merged: .* has nothing"),
    "transposed": (transposed, "could be trained but not merged: .* as .64, 192."),
    "fused": (fused, "could be trained but not merged"),
    "norm": (renamed("model.norm.weight"), "has no tensor model.norm.weight"),
    "embedding": (renamed("model.embed_tokens.weight"), "has no tensor model.embed_tokens"),
}


@pytest.mark.parametrize("kind", ["nf4", "dense"])
@pytest.mark.parametrize("case", HOMELESS)
def test_what_has_no_home_is_refused_before_anything_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, kind: str
) -> None:
    change, match = HOMELESS[case]
    base = make_checkpoint(tmp_path / "base")
    model = load(base, kind)
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})

    def never(*args: Any) -> None:
        raise AssertionError("a mask was selected")

    monkeypatch.setattr("leanlift.model.attach.selection", never)
    with pytest.raises(UserError, match=match):
        get_lift_model(model, LiftConfig(approx_rank=8), progress=False)
    assert not lift_layers(model)


CHANGED = {
    "norm": ("model.norm.weight", 3),
    "embedding": ("model.embed_tokens.weight", 0),
    "target": ("model.layers.1.mlp.up_proj.weight", slice(None)),
}


@pytest.mark.parametrize("kind", ["nf4", "dense"])
@pytest.mark.parametrize("case", CHANGED)
def test_a_model_that_is_no_longer_its_checkpoint_is_refused(
    tmp_path: Path, case: str, kind: str
) -> None:
    """As where loading makes zeros of a row: a merge would look for the base that was trained."""
    base = make_checkpoint(tmp_path / "base")
    model = load(base, kind)
    tensors = load_file(base / "model.safetensors")
    name, rows = CHANGED[case]
    tensors[name][rows] += 0.25
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"the model has other .* could not be merged"):
        get_lift_model(model, LiftConfig(approx_rank=8), progress=False)
    assert not lift_layers(model)


def test_targets_that_have_a_home_can_be_trained_alone(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    model = load(base, "nf4")
    tensors = load_file(base / "model.safetensors")
    fused(tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = LiftConfig(approx_rank=8, target_modules=("q_proj", "down_proj"))
    get_lift_model(model, config, progress=False)
    save_adapter(model, tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=base, progress=False)


def test_a_model_that_came_from_no_checkpoint_is_attached_to_all_the_same(tmp_path: Path) -> None:
    model = load(make_checkpoint(tmp_path / "base"), "dense")
    for name in ("", "LlamaForCausalLM", "nobody/nothing", str(tmp_path / "gone")):
        model.config._name_or_path = name
        get_lift_model(model, LiftConfig(approx_rank=8), progress=False)
        save_adapter(model, tmp_path / "adapter")
        model = load(tmp_path / "base", "dense")


@pytest.mark.parametrize("main", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("onto", ["original", "quantized"])
def test_the_few_exact_tensors_of_a_16_bit_checkpoint_keep_their_bits(
    tmp_path: Path, main: torch.dtype, onto: str
) -> None:
    base = make_checkpoint(tmp_path / "base", dtype=main)
    model = get_lift_model(load(base, "nf4", main), LiftConfig(approx_rank=8), progress=False)
    for layer in lift_layers(model).values():
        layer.values.data.normal_(std=0.05)
    save_adapter(model, tmp_path / "adapter")
    tensors = load_file(base / "model.safetensors")
    exact = {
        "model.layers.0.mlp.gate.e_score_correction_bias": torch.tensor([39.015, 1e-9, 3e38]),
        "model.layers.0.mlp.gate.table": torch.full((3, 4), 39.015),
        "model.layers.0.mlp.steps": torch.tensor([2**40 + 1]),
    }
    if main == torch.float32:  # fp32 is the rule, and one that has no room in fp16 is an error
        exact["model.layers.0.mlp.gate.e_score_correction_bias"][2] = 3.0
    save_file({**tensors, **exact}, base / "model.safetensors", metadata={"format": "pt"})
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        output = tmp_path / name
        merge_adapter(tmp_path / "adapter", output, base=base, dtype=name, onto=onto,
                      progress=False)  # fmt: skip
        merged = load_file(output / "model.safetensors")
        for key, tensor in merged.items():
            kept = key in exact and (main != torch.float32 or not tensor.is_floating_point())
            assert tensor.dtype == (exact[key].dtype if kept else dtype), key
            if kept:
                assert torch.equal(tensor, exact[key]), key
