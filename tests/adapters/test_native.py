"""An adapter on disk: every bit comes back, and another base's or a damaged one is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import load, make_checkpoint
from trained import logits

from leanlift import LiftConfig, UserError, get_lift_model, load_adapter, refresh_mask, save_adapter
from leanlift.adapters.native import check_values
from leanlift.measure import LiveBytes
from leanlift.model import lift_layers, lift_state


@pytest.mark.parametrize("kind", ["nf4+double", "int8", "dense"])
def test_save_and_load_keep_every_bit(base: Path, tmp_path: Path, kind: str) -> None:
    model = get_lift_model(load(base, kind), LiftConfig(approx_rank=8), progress=False)
    for layer in lift_layers(model).values():
        layer.values.data.normal_(std=0.1)
    assert refresh_mask(model).churn > 0
    save_adapter(model, tmp_path / "a")
    fresh = load_adapter(load(base, kind), tmp_path / "a")
    assert torch.equal(logits(fresh), logits(model))
    assert lift_state(fresh).refreshes == 1
    save_adapter(fresh, tmp_path / "b")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "pt") as file:
        assert any(".settled." in key for key in file.keys())  # noqa: SIM118


def test_loading_onto_a_patched_model_replaces_its_entries(base: Path, tmp_path: Path) -> None:
    model = get_lift_model(load(base), LiftConfig(approx_rank=8), progress=False)
    before = logits(model)
    save_adapter(model, tmp_path)
    parameters = [layer.values for layer in lift_layers(model).values()]
    for layer in lift_layers(model).values():
        layer.values.data.normal_(std=0.1)
    refresh_mask(model)
    load_adapter(model, tmp_path)
    assert torch.equal(logits(model), before)
    assert all(layer.retired_index is None for layer in lift_layers(model).values())
    kept = [layer.values for layer in lift_layers(model).values()]
    assert all(a is b for a, b in zip(parameters, kept, strict=True))


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    model = get_lift_model(load(base), LiftConfig(approx_rank=8), progress=False)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_of_another_base_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    model = load(base, "int8")
    with pytest.raises(UserError, match=r"trained over .* in nf4\+double .* has it in int8"):
        load_adapter(model, adapter)
    assert not lift_layers(model)
    wider = make_checkpoint(tmp_path / "wider", hidden=128)
    with pytest.raises(UserError, match=r"whose .* is 64x64; the loaded model .* has"):
        load_adapter(load(wider), adapter)
    twin = make_checkpoint(tmp_path / "twin")
    tensors = load_file(twin / "model.safetensors")
    tensors["model.embed_tokens.weight"][0, 0] += 1
    save_file(tensors, twin / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="same shapes but other weights"):
        load_adapter(load(twin), adapter)


def test_damaged_adapters_are_refused_in_one_sentence(base: Path, adapter: Path) -> None:
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    tensors, whole, text = load_file(weights), weights.read_bytes(), config.read_text()
    name = "model.layers.0.self_attn.q_proj"

    def refused(match: str) -> None:
        model = load(base)
        with pytest.raises(UserError, match=match):
            load_adapter(model, adapter)
        assert not lift_layers(model)

    def with_tensors(**changes: torch.Tensor | None) -> None:
        new = {**tensors, **{f"{name}.{k.replace('__', '.')}": v for k, v in changes.items()}}
        save_file({k: v for k, v in new.items() if v is not None}, weights)

    weights.write_bytes(whole[:-7])
    refused("not a whole safetensors file")
    with_tensors(values=None)
    refused(f"lacks {name}.values")
    with_tensors(values=tensors[f"{name}.values"][:-1].clone())
    refused("values for .* positions")
    with_tensors(values=torch.full_like(tensors[f"{name}.values"], float("nan")))
    refused("NaN or infinite offsets")
    with_tensors(values=tensors[f"{name}.values"].int())
    refused("expected a 1-D floating tensor")
    columns = tensors[f"{name}.index.columns"]
    with_tensors(index__columns=columns.flip(0).contiguous())
    refused(f"the index of {name} .* is broken")
    with_tensors(index__columns=columns.clamp(min=64))
    refused("lies outside its segment")
    with_tensors(index__counts=tensors[f"{name}.index.counts"][:-1].clone())
    refused("expected counts as uint8")
    weights.write_bytes(whole)
    data = json.loads(text)
    config.write_text(json.dumps({**data, "format_version": 99}))
    refused("has adapter format 99")
    config.write_text(json.dumps({"peft_type": "LORA"}))
    refused("was not written by leanlift")
    config.write_text(text[:-20])
    refused("is not valid JSON")
    config.write_text(json.dumps({**data, "lift": {**data["lift"], "magic": 1}}))
    refused("unknown LiftConfig keys")
    config.unlink()
    refused("is no leanlift adapter")
    weights.unlink()
    config.write_text(text)
    refused("does not exist")


def test_offsets_are_looked_at_without_a_second_form_of_them() -> None:
    values = torch.randn(300_000)
    with LiveBytes() as live:
        check_values(values, torch.bfloat16, "x")
        check_values(values[:0], torch.bfloat16, "x")
    assert live.peak < 100
    values[200_000] = 3.4e38  # infinite in bf16
    check_values(values, torch.float32, "x")
    for number, dtype in (
        (3.4e38, torch.bfloat16),
        (-3.4e38, torch.bfloat16),
        (float("nan"), torch.float32),
        (float("-inf"), torch.float32),
    ):
        values[200_000] = number
        with pytest.raises(UserError, match="NaN or infinite offsets"):
            check_values(values, dtype, "x")
