"""Families with experts: what is trained, gradients, refreshes, adapters and merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import (
    CONFIG,
    EXPERTS,
    MIXTURES,
    attached,
    batch,
    dense_twin,
    experts_of,
    logits,
    move,
)
from sweeps import swept
from tiny import load
from torch import nn
from transformers.core_model_loading import Transpose

from leanlift import (
    LiftConfig,
    PlanSettings,
    UserError,
    combine_adapters,
    export_peft,
    get_lift_model,
    load_adapter,
    merge_adapter,
    plan_memory,
    refresh_mask,
    save_adapter,
    unload_adapter,
)
from leanlift.adapters import open_adapter
from leanlift.errors import MaskError
from leanlift.layers import LiftLinear
from leanlift.model import lift_layers, lift_state, lifted
from leanlift.model.stacks import named_parts
from leanlift.optim import SparseAdamW
from leanlift.selection import Principal, select
from leanlift.tiles import part_shape
from leanlift.weights.stacks import ExpertStack

each_family = pytest.mark.parametrize("family", MIXTURES)


@each_family
def test_all_experts_are_targets_each_with_entries_of_its_own(
    bases: dict[str, Path], family: str
) -> None:
    stock = {n: p for n, p in named_parts(load(bases[family], "dense")).items()
             if isinstance(p, ExpertStack)}  # fmt: skip
    model = attached(bases[family])
    layers = experts_of(model)
    assert list(layers) == list(stock)
    assert len(layers) == 2 * 2
    for name, layer in layers.items():
        m, n = part_shape(layer.weight_tiles)
        assert layer.experts == EXPERTS
        for expert, matrix in enumerate(stock[name].weight.detach()):
            wanted = select(matrix, Principal(8), int(0.1 * m * n))
            assert torch.equal(layer.index.decode(expert * m, (expert + 1) * m), wanted), name
    trained = {name for name, p in lifted(model).named_parameters() if p.requires_grad}
    assert trained == {f"{name}.values" for name in lift_layers(model)}


@each_family
def test_routers_are_trained_only_where_they_are_named(bases: dict[str, Path], family: str) -> None:
    leaves = ("gate", "router")
    assert not [n for n in lift_layers(attached(bases[family])) if n.endswith(leaves)]


def test_a_router_that_is_a_linear_is_trained_if_it_is_named() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(16, 4)
            self.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])

    model = nn.Module()
    model.layers = nn.ModuleList([Block()])
    rank = {"approx_rank": 4, "density": 0.25}
    named = LiftConfig(target_modules=("router",), **rank)
    assert list(lift_layers(get_lift_model(model, named, progress=False))) == ["layers.0.router"]
    model.layers = nn.ModuleList([Block()])
    del model.leanlift
    found = lift_layers(get_lift_model(model, LiftConfig(**rank), progress=False))
    assert list(found) == [f"layers.0.experts.{e}" for e in range(4)]


@each_family
@pytest.mark.parametrize("part", ["experts", "self_attn", "router"])
def test_what_is_named_and_is_no_matrix_is_refused_before_anything_is_loaded(
    bases: dict[str, Path], family: str, part: str
) -> None:
    model = load(bases[family], "dense")
    if part == "router":
        part = next(n for n, m in model.named_modules() if n.endswith((".gate", ".router")))
    config = LiftConfig(target_modules=("q_proj", part))
    with pytest.raises(MaskError, match="leanlift trains Linears and stacks") as refused:
        plan_memory(bases[family], config, PlanSettings(max_length=8, cuda=False))
    assert ("name what is in it" in str(refused.value)) == (part in ("experts", "self_attn"))
    with pytest.raises(MaskError) as too:
        get_lift_model(model, config, progress=False)
    assert str(too.value) == str(refused.value)


@pytest.mark.parametrize("inside", ["wg", "layer"])
@pytest.mark.parametrize("name", ["gate", "router", "chooser"])
def test_a_router_of_several_parts_is_one_too(name: str, inside: str) -> None:
    """By its name beside experts, or by its class."""

    class TopKRouter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(inside, nn.Linear(16, 4))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(name, TopKRouter() if name == "chooser" else nn.Sequential())
            getattr(self, name).add_module(inside, nn.Linear(16, 4))
            self.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])

    model = nn.Module()
    model.layers = nn.ModuleList([Block()])
    rank = {"approx_rank": 4, "density": 0.25}
    found = lift_layers(get_lift_model(model, LiftConfig(**rank), progress=False))
    assert list(found) == ["layers.0.experts.0", "layers.0.experts.1"]


@each_family
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_loss_and_gradients_are_those_of_a_dense_model(
    bases: dict[str, Path], family: str, kind: str
) -> None:
    model, stock = attached(bases[family], kind), load(bases[family], "dense")
    move(model)
    parts = dense_twin(model, stock)
    for name, module in lifted(model).named_modules():
        if hasattr(module, "weight_tiles") and name not in lift_layers(model):
            parts[name].weight.data.copy_(module.weight_tiles.rows(0, module.out_features))
    wanted = stock.eval()(**batch()).loss
    wanted.backward()
    loss = model.eval()(**batch()).loss
    loss.backward()
    torch.testing.assert_close(loss, wanted)
    for name, layer in lift_layers(model).items():
        dense = parts[name].weight.grad
        assert layer.values.grad is not None, name
        found = layer.values.grad - dense.reshape(-1)[layer.index.to_flat()]
        assert float(found.abs().max()) <= 1e-4 * float(dense.abs().max()), name


@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
def test_however_a_model_was_to_compute_it_computes_in_groups(
    bases: dict[str, Path], way: str
) -> None:
    stock = load(bases["mixtral"], "dense")
    stock.set_experts_implementation(way)
    wanted = logits(stock)
    model = get_lift_model(stock, CONFIG, progress=False)
    torch.testing.assert_close(logits(model), wanted)
    assert model.config._experts_implementation == "grouped_mm"


def test_checkpointing_changes_no_gradient(bases: dict[str, Path]) -> None:
    model = attached(bases["qwen3_moe"]).train()
    model(**batch()).loss.backward()
    wanted = {name: layer.values.grad for name, layer in lift_layers(model).items()}
    model.zero_grad(set_to_none=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model(**batch()).loss.backward()
    for name, layer in lift_layers(model).items():
        assert torch.equal(layer.values.grad, wanted[name]), name  # type: ignore[arg-type]


@pytest.mark.parametrize("family", swept(MIXTURES, "qwen3_moe", "gpt_oss"))
def test_adapters_come_back_and_are_merged_into_what_is_on_disk(
    bases: dict[str, Path], tmp_path: Path, family: str
) -> None:
    model = attached(bases[family])
    optimizer = SparseAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(3):
        model.train()(**batch(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        refresh_mask(model, optimizer)  # so that there are retired entries
    assert any(layer.retired_index is not None for layer in experts_of(model).values())
    save_adapter(model, tmp_path / "adapter")
    wanted, unlifted = logits(model), logits(load(bases[family], "dense"))
    assert not torch.equal(wanted, unlifted)
    again = load_adapter(load(bases[family], "dense"), tmp_path / "adapter")
    assert torch.equal(logits(again), wanted)
    torch.testing.assert_close(logits(unload_adapter(again)), unlifted)  # sums in another order
    assert torch.equal(logits(load_adapter(again, tmp_path / "adapter")), wanted)
    for onto in ("original", "quantized"):
        merge_adapter(tmp_path / "adapter", tmp_path / onto, dtype="float32", onto=onto,
                      progress=False)  # fmt: skip
        torch.testing.assert_close(logits(load(tmp_path / onto, "dense")), wanted)


def test_experts_have_no_place_in_pefts_form(bases: dict[str, Path], tmp_path: Path) -> None:
    model = attached(bases["qwen3_moe"])
    parts = lift_state(model).base.parts
    assert parts == dict.fromkeys(experts_of(model), EXPERTS)
    save_adapter(model, tmp_path / "adapter")
    with open_adapter(tmp_path / "adapter") as adapter:
        assert adapter.base.parts == parts
    with pytest.raises(UserError, match=r"with experts .*, which PEFT's SHiRA has no place"):
        export_peft(tmp_path / "adapter", tmp_path / "peft", progress=False)
    assert not (tmp_path / "peft").exists()
    config = LiftConfig(density=0.1, approx_rank=8, target_modules="attention")
    save_adapter(attached(bases["qwen3_moe"], config=config), tmp_path / "attention")
    export_peft(tmp_path / "attention", tmp_path / "peft", progress=False)


def test_an_adapter_with_experts_takes_the_place_of_one_without(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases["mixtral"]
    whole = attached(base)
    move(whole)
    save_adapter(whole, tmp_path / "whole")
    model = attached(
        base, config=LiftConfig(density=0.1, approx_rank=8, target_modules=("q_proj",))
    )
    move(model)
    save_adapter(model, tmp_path / "part")
    part = logits(model)
    assert torch.equal(logits(load_adapter(model, tmp_path / "whole")), logits(whole))
    assert lift_state(model).base.parts == lift_state(whole).base.parts
    assert torch.equal(logits(load_adapter(model, tmp_path / "part")), part)
    assert not lift_state(model).base.parts
    combine_adapters([tmp_path / "part", tmp_path / "whole"], tmp_path / "both", progress=False)
    with open_adapter(tmp_path / "both") as adapter:
        assert adapter.base.parts == lift_state(whole).base.parts


@pytest.mark.parametrize("limit", [None, 0.1])
@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_a_refresh_selects_in_each_expert_and_changes_no_weight(
    bases: dict[str, Path], limit: float | None, margin: float
) -> None:
    config = LiftConfig(
        density=0.1, approx_rank=8, retired_limit=limit, refresh_margin=margin,
        refresh_interval=1,
    )  # fmt: skip
    model = attached(bases["gpt_oss"], config=config)
    move(model, 0.1)
    layers = experts_of(model)
    before = {n: m.effective.rows(0, m.weight_tiles.shape[0]) for n, m in layers.items()}
    parameters = {name: id(layer.values) for name, layer in layers.items()}
    report = refresh_mask(model)
    assert 0 < report.churn < 1
    for name, layer in layers.items():
        assert id(layer.values) == parameters[name]
        after = layer.effective.rows(0, layer.weight_tiles.shape[0])
        torch.testing.assert_close(after, before[name])
        m, n = part_shape(layer.weight_tiles)
        for expert in range(EXPERTS):
            rows = expert * m, (expert + 1) * m
            own = layer.learned.rows(*rows)
            assert own.active.count == int(0.1 * m * n)
            if limit is not None and own.retired is not None:
                assert own.retired.count <= limit * own.active.count
            if limit is None and not margin:
                wanted = select(before[name][slice(*rows)], Principal(8), own.active.count)
                assert torch.equal(own.active.index.to_flat(), wanted)


@pytest.mark.parametrize("family", ["qwen3_moe", "llama4"])
@pytest.mark.parametrize("budget", [2**30, 2**16], ids=["one round", "many"])
def test_gradients_choose_in_each_expert(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch, family: str, budget: int
) -> None:
    import leanlift.model.attach as room

    original = room.gradient_masks
    monkeypatch.setattr(room, "gradient_masks", lambda *a, **k: original(*a, budget=budget, **k))
    stock = load(bases[family], "dense")
    stock.eval()(**batch()).loss.backward()
    parts = named_parts(stock)
    config = LiftConfig(density=0.05, selector="gradient")
    model = get_lift_model(
        load(bases[family], "dense").eval(), config, progress=False, calibration=[batch()]
    )
    for name, layer in experts_of(model).items():
        m, n = part_shape(layer.weight_tiles)
        for expert, gradient in enumerate(parts[name].weight.grad):
            found = layer.index.decode(expert * m, (expert + 1) * m)
            assert found.numel() == int(0.05 * m * n)
            scores = gradient.abs().reshape(-1)
            left = torch.ones_like(scores, dtype=torch.bool)
            left[found] = False
            assert float(scores[found].min()) >= 0.999 * float(scores[left].max()) - 1e-12


def test_a_stack_without_a_home_is_refused_by_name_before_anything_is_selected(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(bases["mixtral"], "dense")
    conversions = list(model._weight_conversions)
    for conversion in conversions:
        if conversion.target_patterns == [".experts.down_proj"]:
            conversion.operations.append(Transpose(1, 2))
    model._weight_conversions = conversions

    def never(*args: Any) -> None:
        raise AssertionError("a mask was selected")

    monkeypatch.setattr("leanlift.model.attach.selection", never)
    with pytest.raises(UserError, match=r"experts\.down_proj.*could be trained but not merged"):
        get_lift_model(model, CONFIG, progress=False)
    parts = named_parts(model)
    assert not any(isinstance(part, LiftLinear) for part in parts.values())
    assert any(isinstance(part, ExpertStack) for part in parts.values())


def test_a_three_dimensional_parameter_of_anything_else_is_no_stack() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_experts = 4
            self.mix = nn.Parameter(torch.randn(4, 8, 8))
            self.convolution = nn.Conv1d(4, 4, 3)

    assert not any(isinstance(part, ExpertStack) for part in named_parts(Mixing()).values())
