"""Attaching to a model: targets, refusals, ownership of the base, saving and loading."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import load
from torch import nn
from trained import KINDS, logits
from transformers import (
    AutoModelForCausalLM,
)

from leanlift import LiftConfig, UserError, get_lift_model, save_adapter
from leanlift.layers import FrozenLinear
from leanlift.model import lift_layers, lift_state, use_ops
from leanlift.model.gradient import gradient_masks
from leanlift.selection import Magnitude, Principal, select


@pytest.mark.parametrize("kind", KINDS)
def test_attaching_changes_nothing_but_what_trains(base: Path, kind: str) -> None:
    """Before training, logits are those of the dequantized base, and only values train."""
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = load(base, kind)
    made = get_lift_model(model, LiftConfig(approx_rank=8), progress=False)
    assert made.get_base_model() is model
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = lift_layers(model)
    assert trainable == {f"{name}.values" for name in layers}
    assert len(layers) == 14
    assert not any("lm_head" in name or "embed" in name for name in layers)
    for name, layer in layers.items():
        assert layer.index.count == int(0.05 * layer.in_features * layer.out_features)
        stock.get_submodule(name).weight.data.copy_(layer.effective.rows(0, layer.out_features))
    torch.testing.assert_close(logits(model), logits(stock.eval()), rtol=1e-5, atol=1e-6)


def test_the_mask_is_the_principal_one_of_the_dequantized_weights(base: Path) -> None:
    model = get_lift_model(load(base), LiftConfig(approx_rank=8), progress=False)
    layer = lift_layers(model)["model.layers.0.mlp.down_proj"]
    weight = layer.weight_tiles.rows(0, layer.out_features)
    assert torch.equal(layer.index.to_flat(), select(weight, Principal(8), layer.index.count))
    assert lift_state(model).unconverged == []


def test_the_marks_of_a_quantized_model_are_gone(base: Path) -> None:
    for kind in ("nf4", "int8"):
        model = get_lift_model(load(base, kind), LiftConfig(approx_rank=8), progress=False)
        assert not model.is_quantized
        assert not getattr(model, "is_loaded_in_4bit", False)
        assert not getattr(model, "is_loaded_in_8bit", False)
        assert getattr(model.config, "quantization_config", None) is None


def test_print_trainable_parameters_counts_unpacked_weights(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock = AutoModelForCausalLM.from_pretrained(base)
    model = get_lift_model(load(base), LiftConfig(approx_rank=8), progress=False)
    model.print_trainable_parameters()
    total = sum(p.numel() for p in stock.parameters())
    assert f"all params: {total:,} " in capsys.readouterr().out


def test_generation_works_and_twice_the_same(base: Path) -> None:
    model = get_lift_model(load(base), LiftConfig(approx_rank=8), progress=False).eval()
    ids = torch.arange(3, 13).reshape(1, 10)
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, **options))


def test_models_in_one_process_do_not_disturb_each_other(base: Path) -> None:
    one = get_lift_model(load(base), LiftConfig(approx_rank=8), progress=False)
    two = get_lift_model(load(base, "int8"), LiftConfig(approx_rank=4), progress=False)
    first = logits(one)
    for layer in lift_layers(two).values():
        layer.values.data.normal_()
    logits(two)
    assert lift_state(one).scratch is not lift_state(two).scratch
    assert torch.equal(logits(one), first)


def test_quantized_linears_outside_the_targets_are_read_by_us_too(base: Path) -> None:
    """bitsandbytes' own CPU forward would repack them at the first evaluation."""
    config = LiftConfig(approx_rank=8, target_modules=("q_proj", "v_proj"))
    model = get_lift_model(load(base), config, progress=False).eval()
    everything = get_lift_model(load(base), LiftConfig(approx_rank=8), progress=False).eval()
    assert len(lift_layers(model)) == 4
    assert sum(isinstance(module, FrozenLinear) for module in model.modules()) == 14
    first = logits(model)
    assert torch.equal(first, logits(everything))
    assert torch.equal(first, logits(model))


def test_budgets(base: Path) -> None:
    model = get_lift_model(load(base), LiftConfig(rank_budget=3, approx_rank=8), progress=False)
    assert all(
        layer.index.count == 3 * (layer.in_features + layer.out_features)
        for layer in lift_layers(model).values()
    )


@pytest.mark.parametrize(
    ("preset", "endings"),
    [
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("mlp", {"gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_target_presets(base: Path, preset: str, endings: set[str]) -> None:
    config = LiftConfig(approx_rank=8, target_modules=preset)
    model = get_lift_model(load(base), config, progress=False)
    assert {name.rpartition(".")[2] for name in lift_layers(model)} == endings


def test_a_density_of_ones_own(base: Path) -> None:
    own = {"down_proj": 0.1, r"layers\.1\.self_attn\..*": 0.02}
    model = get_lift_model(
        load(base), LiftConfig(approx_rank=8, density_pattern=own), progress=False
    )
    for name, layer in lift_layers(model).items():
        density = 0.1 if "down_proj" in name else 0.02 if "layers.1.self_attn" in name else 0.05
        assert layer.index.count == int(density * layer.in_features * layer.out_features), name


@pytest.mark.parametrize("kind", ["nf4+double", "int8", "dense"])
def test_gradient_selection_is_that_of_the_dense_gradients(
    base: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In rounds of one row tile per matrix, against the dense gradients of a plain model."""
    torch.manual_seed(0)
    ids = [torch.randint(3, 90, (2, 12)) for _ in range(3)]
    batches = [{"input_ids": i, "labels": i} for i in ids]
    in_rounds = functools.partial(gradient_masks, budget=100_000)
    monkeypatch.setattr("leanlift.model.attach.gradient_masks", in_rounds)
    config = LiftConfig(selector="gradient", density=0.05)
    model = get_lift_model(load(base, kind), config, progress=False, calibration=batches)

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, layer in lift_layers(model).items():
        weight = plain.get_submodule(name).weight
        weight.data.copy_(layer.weight_tiles.rows(0, layer.out_features))
    for batch in batches:
        plain(**batch).loss.backward()
    for name, layer in lift_layers(model).items():
        gradient = plain.get_submodule(name).weight.grad
        wanted = select(gradient, Magnitude(), layer.index.count)
        shared = torch.isin(layer.index.to_flat(), wanted).double().mean()
        assert shared >= 0.995, name  # near-ties may swap: fp32 sums in another order
        assert layer.observer is None


def test_a_refused_calibration_leaves_the_model_as_it_was(base: Path) -> None:
    model = load(base)
    config = LiftConfig(selector="gradient")
    with pytest.raises(UserError, match="at least one calibration batch"):
        get_lift_model(model, config, progress=False)
    assert not any(isinstance(module, FrozenLinear) for module in model.modules())
    get_lift_model(model, LiftConfig(approx_rank=8), progress=False)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"density_pattern": {"a": 2.0}}, r"density in \(0, 1\]; got .*2.0"),
        ({"density_pattern": {"(": 0.1}}, "no regular expression"),
        ({"block": 0}, "expected block as a whole number, at least 1"),
        ({"block": 4, "selector": "random"}, "expected block=1"),
        ({"selector": "gradient", "refresh_interval": 5}, "refresh_interval=0 with it"),
        ({"selection_tile_mib": 0}, "selection_tile_mib"),
        ({"density": 0.0}, r"density as a number in \(0, 1\]"),
        ({"density": 1.5}, r"density as a number in \(0, 1\]"),
        ({"density": -0.1}, r"density as a number in \(0, 1\]"),
        ({"rank_budget": 0}, "rank_budget as a whole number, at least 1"),
        ({"approx_rank": 0}, "approx_rank as a whole number, at least 1"),
        ({"refresh_interval": -1}, "refresh_interval"),
        ({"selector": "best"}, "selector as one of"),
    ],
)
def test_config_refuses(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        LiftConfig(**changes)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (LiftConfig(target_modules=("c_attn",)), r"matches nothing.*called \['down_proj'"),
        (LiftConfig(density=1e-6), "selects 0 entries"),
        (LiftConfig(rank_budget=500), "expected 1 to"),
    ],
    ids=["no-match", "nothing-selected", "more-than-there-is"],
)
def test_a_refused_model_is_unchanged(base: Path, config: LiftConfig, match: str) -> None:
    model = load(base)
    with pytest.raises(UserError, match=match):
        get_lift_model(model, config, progress=False)
    assert model.is_loaded_in_4bit
    assert not lift_layers(model)
    get_lift_model(model, LiftConfig(approx_rank=8), progress=False)


def test_a_base_spread_over_devices_is_refused(base: Path) -> None:
    model = load(base)
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1, "lm_head": "cpu"}
    with pytest.raises(UserError, match=r"spread over 0, 1, cpu .* accelerate launch"):
        get_lift_model(model, LiftConfig(approx_rank=8), progress=False)
    model.hf_device_map = {"": "cpu"}
    get_lift_model(model, LiftConfig(approx_rank=8), progress=False)


def test_attaching_twice_is_refused(base: Path) -> None:
    model = get_lift_model(load(base), LiftConfig(approx_rank=8), progress=False)
    with pytest.raises(UserError, match="has leanlift layers already"):
        get_lift_model(model, LiftConfig(approx_rank=8), progress=False)


def test_nan_weights_are_counted_and_named(base: Path) -> None:
    model = load(base, "dense")
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data[3, :2] = float("nan")
    with pytest.raises(
        UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has 2 NaN or infinite"
    ):
        get_lift_model(model, LiftConfig(approx_rank=8), progress=False)
    assert not lift_layers(model)


def test_a_model_without_linears_is_refused() -> None:
    with pytest.raises(UserError, match="found no Linear inside the blocks"):
        get_lift_model(nn.Sequential(nn.Linear(4, 4)), LiftConfig(), progress=False)


def test_ops_are_chosen_by_name_and_not_saved(base: Path, tmp_path: Path) -> None:
    model = get_lift_model(load(base), LiftConfig(approx_rank=8), progress=False)
    assert lift_state(model).workspace.implementation == "auto"
    use_ops(model, "torch")
    assert lift_state(model).workspace.implementation == "torch"
    with pytest.raises(UserError, match="ops=triton needs"):
        use_ops(model, "triton")
    save_adapter(model, tmp_path / "a")
    assert '"ops"' not in (tmp_path / "a" / "adapter_config.json").read_text()
