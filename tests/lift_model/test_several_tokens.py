"""Several adapters that train the same tokens; what is taken off, copied and loaded beside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sweeps import swept
from tiny import load
from trained import KINDS, attached, held, logits, move

from leanlift import LiftConfig, LiftModel, UserError, load_adapter, scale_adapter
from leanlift.model import lift_layers, refresh_mask, unload_adapter

TOKENS = (5, 9, 30)
MORE = LiftConfig(approx_rank=8, selector="magnitude", trainable_token_indices=TOKENS)


def one(base: Path, kind: str = "nf4") -> LiftModel:
    return attached(base, kind, trainable_token_indices=TOKENS)


@pytest.mark.parametrize("kind", swept(KINDS, "nf4"))
def test_each_adapter_has_its_own_rows(base: Path, tmp_path: Path, kind: str) -> None:
    model, of_base = one(base, kind), logits(one(base, kind))
    move(model)
    found = {"default": logits(model)}
    model.add_adapter("more", MORE)
    model.set_adapter("more")
    assert torch.equal(logits(model), of_base)
    move(model, seed=2)
    found["more"] = logits(model)
    model.save_pretrained(tmp_path)
    again = LiftModel.from_pretrained(load(base, kind), tmp_path)
    again.load_adapter(tmp_path / "more", "more", is_trainable=True)
    for name in ("default", "more", "default"):
        model.set_adapter(name)
        again.set_adapter(name)
        assert torch.equal(logits(model), found[name]), name
        assert torch.equal(logits(again), found[name]), name
    model.add_weighted_adapter(["more"], [1.0], "sum")
    model.set_adapter("sum")
    assert torch.allclose(logits(model), found["more"], atol=1e-6)


def test_a_copy_of_what_has_learned_nothing_is_the_base(base: Path) -> None:
    model, of_base = one(base), logits(attached(base))
    taken = held(model)
    model.add_adapter("ref", model.peft_config["default"])
    assert held(model) == taken
    move(model)
    trained_now = logits(model)
    model.set_adapter("ref", inference_mode=True)
    assert torch.equal(logits(model), of_base)
    refresh_mask(model)  # nothing to choose
    model.merge_adapter()
    assert torch.equal(logits(model), of_base)
    model.unmerge_adapter()
    model.set_adapter("default")
    assert torch.equal(logits(model), trained_now)


@pytest.mark.parametrize("part", ["embed_tokens", "q_proj"])
def test_a_copy_is_saved_whole_where_a_part_has_learned_nothing(
    base: Path, tmp_path: Path, part: str
) -> None:
    model = one(base)
    move(model)
    for name, layer in lift_layers(model).items():
        if name.endswith(part):
            layer.values.data.zero_()
    wanted = logits(model)
    model.add_adapter("ref", model.peft_config["default"])
    move(model, seed=3)
    model.save_pretrained(tmp_path)
    again = load_adapter(load(base, "nf4"), tmp_path / "ref")
    assert torch.equal(logits(again), wanted)
    assert lift_layers(again).keys() == lift_layers(model).keys()


def test_what_is_loaded_in_a_place_keeps_its_parameters(base: Path, tmp_path: Path) -> None:
    """An optimizer knows them."""
    model = one(base)
    move(model)
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    model.add_adapter("more", MORE)
    parameters = {name: layer.values for name, layer in lift_layers(model).items()}
    move(model, seed=4)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model), wanted)
    assert all(layer.values is parameters[name] for name, layer in lift_layers(model).items())


@pytest.mark.parametrize("how", ["unload_adapter", "unload"])
def test_unloaded_it_is_the_base_whatever_was_on_it(base: Path, tmp_path: Path, how: str) -> None:
    model, of_base = one(base), logits(attached(base))
    move(model)
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    model.add_adapter("more", MORE)
    model.set_adapter("more")
    move(model, seed=2)
    if how == "unload":
        model.unload()
    else:
        unload_adapter(model)
    assert torch.equal(logits(model), of_base)
    assert held(model) == 0
    assert list(model.peft_config) == [model.active_adapter] == ["default"]
    load_adapter(model, tmp_path)
    assert torch.equal(logits(model), wanted)


def test_nothing_is_saved_where_one_cannot_be(base: Path, tmp_path: Path) -> None:
    model = one(base)
    model.add_adapter("more", MORE)
    model.set_adapter("more")
    move(model)
    scale_adapter(model, 0.5)
    model.set_adapter("default")
    with pytest.raises(UserError, match=r"scaled by 0\.5"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    model.save_pretrained(tmp_path / "saved", selected_adapters=["default"])
