"""Adapters as things to work with: PEFT's form and back, switch, scale, unload, combine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, ShiraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import load, make_checkpoint
from trained import KINDS, dense_offsets, logits, trained

from leanlift import (
    LiftConfig,
    UserError,
    combine_adapters,
    export_peft,
    get_lift_model,
    load_adapter,
    merge_adapter,
    save_adapter,
    scale_adapter,
    unload_adapter,
)
from leanlift.model import lift_layers

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # PEFT's own


def assert_same_offsets(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- PEFT's form ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_stock_peft_computes_what_we_do(base: Path, tmp_path: Path, kind: str) -> None:
    model = trained(base, tmp_path / "adapter", kind)
    export_peft(tmp_path / "adapter", tmp_path / "peft", progress=False)
    # in training mode: bitsandbytes' CPU forward repacks a weight in eval mode
    stock = PeftModel.from_pretrained(load(base, kind).train(), tmp_path / "peft")
    ours, theirs = logits(model), logits(stock)
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()
    assert (ours - logits(unload_adapter(model))).abs().max() > 0.1 * ours.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_keeps_every_entry(base: Path, tmp_path: Path, kind: str) -> None:
    trained(base, tmp_path / "adapter", kind)
    export_peft(tmp_path / "adapter", tmp_path / "peft", progress=False)
    back = load_adapter(load(base, kind), tmp_path / "peft")
    save_adapter(back, tmp_path / "back")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "adapter" / name).read_bytes() == (tmp_path / "back" / name).read_bytes()


def test_padding_is_counted_and_changes_nothing(base: Path, tmp_path: Path) -> None:
    model = trained(base, tmp_path / "adapter", density=0.03)
    done = export_peft(tmp_path / "adapter", tmp_path / "peft", progress=False)
    layers = lift_layers(model).values()
    entries = sum(x.index.count + (x.retired_index.count if x.retired_index else 0) for x in layers)
    room = sum(done.rank * (x.in_features + x.out_features) for x in layers)
    assert (done.entries, done.padding) == (entries, room - entries)
    assert done.padding > 0
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert sum(t.numel() for k, t in tensors.items() if k.endswith("shira_weight")) == room
    assert sum(t.nbytes for t in tensors.values()) == done.nbytes == 12 * room
    assert_same_offsets(dense_offsets(tmp_path / "adapter"), dense_offsets(tmp_path / "peft"))
    card = (tmp_path / "peft" / "README.md").read_text()
    assert "PeftModel.from_pretrained(base" in card


def test_a_budget_by_rank_needs_no_padding(base: Path, tmp_path: Path) -> None:
    model = get_lift_model(load(base), LiftConfig(rank_budget=2, approx_rank=4), progress=False)
    save_adapter(model, tmp_path / "adapter")
    done = export_peft(tmp_path / "adapter", tmp_path / "peft", progress=False)
    assert (done.rank, done.padding) == (2, 0)


def test_entries_that_have_no_room_in_pefts_form_are_refused(base: Path, tmp_path: Path) -> None:
    config = LiftConfig(density=0.02, density_pattern={"down_proj": 0.9}, selector="magnitude")
    save_adapter(get_lift_model(load(base), config, progress=False), tmp_path / "adapter")
    with pytest.raises(UserError, match=r"has no SHiRA form; merge it instead"):
        export_peft(tmp_path / "adapter", tmp_path / "peft", progress=False)
    assert not (tmp_path / "peft").exists()


def test_an_adapter_that_peft_trained_is_loaded(base: Path, tmp_path: Path) -> None:
    stock = get_peft_model(
        load(base, "dense"), ShiraConfig(r=2, target_modules=["q_proj", "down_proj"])
    )
    for name, parameter in stock.named_parameters():
        if "shira_weight" in name:
            torch.manual_seed(len(name))
            parameter.data.normal_(std=0.05)
    stock.save_pretrained(tmp_path / "peft")
    model = load_adapter(load(base, "dense"), tmp_path / "peft")
    assert len(lift_layers(model)) == 4
    expected = logits(stock.eval())
    assert (logits(model.eval()) - expected).abs().max() <= 1e-5 * expected.abs().max()
    save_adapter(model, tmp_path / "ours")
    merge_adapter(tmp_path / "ours", tmp_path / "merged", dtype="float32", progress=False)
    merge_adapter(tmp_path / "peft", tmp_path / "again", dtype="float32", progress=False)
    again = load(tmp_path / "again", "dense").eval()
    assert torch.equal(logits(again), logits(load(tmp_path / "merged", "dense").eval()))


# --- On a live model -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4+double", "int8", "dense"])
def test_switching_is_loading(base: Path, tmp_path: Path, kind: str) -> None:
    one = trained(base, tmp_path / "one", kind)
    two = trained(base, tmp_path / "two", kind, density=0.1, target_modules=("q_proj", "up_proj"))
    first, second = logits(one), logits(two)
    assert not torch.equal(first, second)
    assert torch.equal(logits(load_adapter(one, tmp_path / "two")), second)
    assert len(lift_layers(one)) == 4
    save_adapter(one, tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert torch.equal(logits(load_adapter(one, tmp_path / "one")), first)
    assert torch.equal(logits(load_adapter(unload_adapter(one), tmp_path / "two")), second)


def test_unloading_gives_the_base_back(base: Path, tmp_path: Path) -> None:
    model = get_lift_model(load(base), LiftConfig(approx_rank=8), progress=False)
    before = logits(model)
    for layer in lift_layers(model).values():
        layer.values.data.normal_(std=0.1)
    assert not torch.equal(logits(model), before)
    assert torch.equal(logits(unload_adapter(model)), before)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(UserError, match="has been unloaded"):
        unload_adapter(model)
    with pytest.raises(UserError, match="has been unloaded"):
        save_adapter(model, tmp_path / "none")


def test_scaling_multiplies_the_offsets(base: Path, tmp_path: Path) -> None:
    model = trained(base, tmp_path / "adapter", "dense")
    whole, before = logits(model), logits(load(base, "dense").eval())
    assert torch.equal(logits(scale_adapter(model, 0.0)), before)
    combine_adapters([tmp_path / "adapter"], tmp_path / "half", [0.5], progress=False)
    half = logits(load_adapter(load(base, "dense"), tmp_path / "half").eval())
    assert (logits(scale_adapter(model, 0.5)) - half).abs().max() <= 1e-5 * half.abs().max()
    with pytest.raises(UserError, match=r"scaled by 0\.5"):
        save_adapter(model, tmp_path / "no")
    assert torch.equal(logits(scale_adapter(model, 1.0)), whole)
    with pytest.raises(UserError, match="expected a finite factor"):
        scale_adapter(model, float("nan"))


def test_the_gradient_of_a_scaled_layer_is_scaled(base: Path) -> None:
    model = get_lift_model(load(base), LiftConfig(approx_rank=8), progress=False)
    gradients: dict[float, torch.Tensor] = {}
    for factor in (1.0, 0.25):
        scale_adapter(model, factor)
        model(torch.arange(3, 23)[None]).logits.square().sum().backward()
        values = next(iter(lift_layers(model).values())).values
        assert values.grad is not None
        gradients[factor], values.grad = values.grad, None
    assert torch.equal(0.25 * gradients[1.0], gradients[0.25])  # offsets are zero: same forward


# --- Several adapters of one base ----------------------------------------------------------


def test_combining_is_the_weighted_sum(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "a")
    trained(base, tmp_path / "b", density=0.1, target_modules=("q_proj", "up_proj"))
    weights = [0.5, -2.0]
    combine_adapters([tmp_path / "a", tmp_path / "b"], tmp_path / "sum", weights, progress=False)
    a, b, total = (dense_offsets(tmp_path / name) for name in ("a", "b", "sum"))
    assert set(total) == set(a) | set(b)
    shared = 0
    for name, found in total.items():
        expected = 0.5 * a.get(name, torch.zeros_like(found))
        expected = expected - 2 * b.get(name, torch.zeros_like(found))
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
        shared += int(((a.get(name, 0 * found) != 0) & (b.get(name, 0 * found) != 0)).sum())
    assert shared > 100
    live = load_adapter(load(base), tmp_path / "sum").eval()
    merge_adapter(tmp_path / "sum", tmp_path / "merged", dtype="float32", onto="quantized",
                  progress=False)  # fmt: skip
    assert torch.equal(logits(live), logits(load(tmp_path / "merged", "dense").eval()))


def test_adapters_of_different_bases_do_not_combine(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "a")
    trained(base, tmp_path / "int8", "int8")
    twin = make_checkpoint(tmp_path / "twin", hidden=128)
    trained(twin, tmp_path / "twin-a")
    for other in ("int8", "twin-a"):
        with pytest.raises(UserError, match="only adapters of one base"):
            combine_adapters([tmp_path / "a", tmp_path / other], tmp_path / "sum", progress=False)
    for weights in ([1.0], [1.0, float("inf")]):
        with pytest.raises(UserError, match="a finite weight for each"):
            combine_adapters([tmp_path / "a"] * 2, tmp_path / "sum", weights, progress=False)
    assert not (tmp_path / "sum").exists()


def test_the_command_line_of_adapters(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from leanlift.cli import main

    trained(base, tmp_path / "a")

    def run(*argv: Any) -> str:
        assert main([str(arg) for arg in argv]) == 0
        return capsys.readouterr().out

    a = tmp_path / "a"
    assert "weighted sum of 2" in run("combine", a, a, "--output", tmp_path / "mean", "--average")
    mean, whole = dense_offsets(tmp_path / "mean"), dense_offsets(a)
    assert all((mean[n] - whole[n]).abs().max() <= 1e-6 * whole[n].abs().max() for n in whole)
    text = run("export", a, tmp_path / "peft", "--format", "peft")
    assert "a SHiRA adapter with r=" in text
    assert "zeros were added" in text
    assert json.loads(run("info", tmp_path / "peft", "--json"))["form"] == "shira"
    assert main(["export", str(a), str(tmp_path / "x"), "--format", "peft", "--verify"]) == 2
    assert "--verify cannot go with --format peft" in capsys.readouterr().err
    assert main(["export", str(a), str(tmp_path / "x"), "--format", "gguf"]) == 2
    assert main(["export", str(a), str(tmp_path / "x"), "--data", "rows.json"]) == 2
    argv = ["combine", str(a), "--output", str(tmp_path / "x"), "--average", "--weights", "1"]
    assert main(argv) == 2
    assert not (tmp_path / "x").exists()
