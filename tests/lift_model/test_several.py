"""Several adapters on one base, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from sweeps import swept
from tiny import load
from trained import KINDS, attached, held, logits, move, trained

from leanlift import LiftConfig, LiftModel, UserError, load_adapter, save_adapter
from leanlift.model import lift_layers, refresh_mask

CONFIG = LiftConfig(approx_rank=8)
IDS = torch.arange(3, 43).reshape(2, 20)


def two(base: Path, kind: str = "nf4") -> tuple[LiftModel, dict[str, torch.Tensor]]:
    """A model with two adapters of other budgets and targets, and the logits of each."""
    model = attached(base, kind)
    move(model)
    refresh_mask(model)
    found = {"default": logits(model)}
    more = LiftConfig(density=0.1, selector="magnitude", target_modules=("up_proj", "o_proj"))
    model.add_adapter("more", more)
    assert torch.equal(logits(model), found["default"])
    model.set_adapter("more")
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(attached(base, kind)))
    move(model, seed=2)
    found["more"] = logits(model)
    return model, found


@pytest.mark.parametrize("kind", swept(KINDS, "nf4"))
def test_several_adapters_take_turns(base: Path, tmp_path: Path, kind: str) -> None:
    model, found = two(base, kind)
    assert sorted(model.peft_config) == ["default", "more"]
    assert not torch.equal(found["default"], found["more"])
    for name in ("default", "more", "more", "default"):
        model.set_adapter(name)
        assert model.active_adapters == [name]
        assert torch.equal(logits(model), found[name])
    assert {n.rpartition(".")[2] for n in lift_layers(model)} > {"up_proj", "o_proj", "q_proj"}
    model.save_pretrained(tmp_path / "both")
    assert model.active_adapter == "default"
    for name, place in {"default": tmp_path / "both", "more": tmp_path / "both" / "more"}.items():
        alone = load_adapter(load(base, kind), place)
        assert torch.equal(logits(alone), found[name]), name
    again = LiftModel.from_pretrained(load(base, kind), tmp_path / "both")
    again.load_adapter(tmp_path / "both" / "more", "more")
    assert torch.equal(logits(again), found["default"])
    again.set_adapter("more", inference_mode=True)
    assert torch.equal(logits(again), found["more"])
    assert not any(p.requires_grad for p in again.parameters())
    again.delete_adapter("more")
    assert torch.equal(logits(again), found["default"])
    with pytest.raises(UserError, match="only adapter"):
        again.delete_adapter("default")


def test_each_adapter_trains_alone(base: Path) -> None:
    model, _ = two(base)
    for name in ("default", "more"):
        model.set_adapter(name)
        other = {"default": "more", "more": "default"}[name]
        trained_now = [p for p in model.parameters() if p.requires_grad]
        assert sum(p.numel() for p in trained_now) == model.get_nb_trainable_parameters()[0]
        model.train()(IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None for p in trained_now)
        for layer in lift_layers(model).values():
            if other in layer.shelf:
                assert layer.shelf[other].values.grad is None
        model.zero_grad(set_to_none=True)
        refresh_mask(model)


def test_a_weighted_sum_is_the_sum_of_the_offsets(base: Path) -> None:
    model, _ = two(base, "dense")
    before = {name: logits_of(model, name) for name in model.peft_config}
    model.add_weighted_adapter(["default", "more"], [0.5, -2.0], "sum")
    model.set_adapter("sum")
    layers = lift_layers(model)
    for name, layer in layers.items():
        wanted = torch.zeros(layer.index.shape, dtype=torch.float64).view(-1)
        for adapter, weight in (("default", 0.5), ("more", -2.0)):
            slot = layer.shelf.get(adapter)
            for store in () if slot is None else slot.learned.stores:
                wanted[store.index.to_flat()] += weight * store.values.double()
        found = torch.zeros_like(wanted)
        found[layer.index.to_flat()] = layer.values.detach().double()
        assert torch.allclose(found, wanted, atol=1e-7), name
    for name, wanted in before.items():
        assert torch.equal(logits_of(model, name), wanted)
    with pytest.raises(UserError, match="a weight for each"):
        model.add_weighted_adapter(["default"], [1.0, 2.0], "other")
    with pytest.raises(UserError, match="linear"):
        model.add_weighted_adapter(["default"], [1.0], "other", combination_type="svd")


@pytest.mark.parametrize("order", [("default", "more"), ("more", "default")])
def test_a_weighted_sum_is_saved_with_all_that_is_known_of_its_base(
    base: Path, tmp_path: Path, order: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    model = attached(base, "nf4", target_modules=("q_proj", "up_proj"))
    move(model)
    more = LiftConfig(density=0.1, selector="magnitude", target_modules=("o_proj", "up_proj"))
    model.add_adapter("more", more)
    model.set_adapter("more")
    move(model, seed=2)
    model.add_weighted_adapter(order, [0.5, 2.0], "sum")
    wanted = logits_of(model, "sum")
    save_adapter(model, tmp_path / "sum")
    assert torch.equal(logits(load_adapter(load(base, "nf4"), tmp_path / "sum").eval()), wanted)
    assert "has no samples" not in caplog.text  # a twin of the base would be seen


def test_a_sum_that_overflows_leaves_nothing(base: Path) -> None:
    model = attached(base, "dense")
    move(model)
    list(lift_layers(model).values())[-1].values.data.fill_(3e38)
    taken = held(model)
    with pytest.raises(UserError, match="overflows"):
        model.add_weighted_adapter(["default", "default"], [1.0, 1.0], "sum")
    assert held(model) == taken
    assert list(model.peft_config) == ["default"]
    model.add_weighted_adapter(["default"], [0.5], "sum")


def logits_of(model: LiftModel, name: str) -> torch.Tensor:
    model.set_adapter(name)
    return logits(model)


@pytest.mark.parametrize("moved", [False, True], ids=["fresh", "trained"])
def test_a_reference_adapter_keeps_what_was_learned_so_far(base: Path, moved: bool) -> None:
    """As TRL makes one: with the configuration object of the adapter itself."""
    model = attached(base)
    if moved:
        move(model)
        refresh_mask(model)
    before, taken = logits(model), held(model)
    model.add_adapter("ref", model.peft_config["default"])
    values = sum(layer.values.nbytes for layer in lift_layers(model).values())
    copied = held(model) - taken
    indices = sum(layer.index.nbytes for layer in lift_layers(model).values())
    retired = sum(layer.retired_nbytes for layer in lift_layers(model).values())
    assert copied == (values + indices + retired if moved else 0)
    if moved:  # of which the values alone are new
        layer = next(iter(lift_layers(model).values()))
        assert layer.shelf["ref"].index is layer.index
    move(model, seed=3)
    refresh_mask(model)
    trained_now = logits(model)
    model.set_adapter("ref", inference_mode=True)
    assert torch.equal(logits(model), before)
    model.set_adapter("default")
    assert torch.equal(logits(model), trained_now)


WRONG: list[tuple[Any, str]] = [
    (lambda m: m.set_adapter("no"), "no adapter 'no'"),
    (lambda m: m.add_adapter("default", CONFIG), "new name"),
    (lambda m: m.add_adapter("a/b", CONFIG), "new name"),
    (lambda m: m.add_adapter("x", peft.LoraConfig()), "expected a LiftConfig"),
    (lambda m: m.add_adapter("x", LiftConfig(selector="gradient")), "from the base alone"),
    (lambda m: m.add_adapter("x", LiftConfig(quantize_embeddings=True)), "which they share"),
    (lambda m: m.add_adapter("x", LiftConfig(trainable_token_indices=(1,))), "which they share"),
    (lambda m: m.add_adapter("x", LiftConfig(target_modules=("none",))), "matches nothing"),
    (lambda m: m.delete_adapter("no"), "no adapter 'no'"),
    (lambda m: m.load_adapter("/nowhere", "x"), "nowhere"),
    (lambda m: m.base_model.set_adapter(["default", "x"]), "add_weighted_adapter"),
    (lambda m: m.get_model_status(), "PEFT's own layers"),
]


@pytest.mark.parametrize(("wrong", "match"), WRONG)
def test_what_cannot_be_is_said_and_changes_nothing(base: Path, wrong: Any, match: str) -> None:
    model = attached(base)
    move(model)
    before, taken = logits(model), held(model)
    with pytest.raises(UserError, match=match):
        wrong(model)
    assert torch.equal(logits(model), before)
    assert held(model) == taken
    assert list(model.peft_config) == ["default"]


def test_a_damaged_adapter_beside_another_leaves_nothing(base: Path, tmp_path: Path) -> None:
    model, _ = trained(base, tmp_path / "adapter"), None
    before, taken = logits(model), held(model)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError):
        model.load_adapter(tmp_path / "adapter", "second")
    assert torch.equal(logits(model), before)
    assert held(model) == taken
    assert list(model.peft_config) == ["default"]
