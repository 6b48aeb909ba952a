"""Merged for a while, and something changes meanwhile: what is computed is the adapter as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sweeps import swept
from tiny import load
from trained import attached, logits, move, trained

from leanlift import LiftConfig, LiftModel, UserError, load_adapter, refresh_mask, scale_adapter
from leanlift.model import lift_layers, unload_adapter

IDS = torch.arange(3, 43).reshape(2, 20)


def two(base: Path, place: Path, kind: str) -> LiftModel:
    model = trained(base, place, kind)
    model.add_adapter("more", LiftConfig(approx_rank=8, density=0.1, selector="magnitude"))
    model.set_adapter("more")
    move(model, seed=2)
    model.set_adapter("default")
    return model


def copy_of(model: LiftModel, change: Callable[[Any, Path], Any], place: Path) -> Any:
    other = copy.deepcopy(model)
    change(other, place)
    return other.eval()


def step(model: Any, place: Path) -> None:
    """What an optimizer of the same values, made before, does."""
    with torch.no_grad():
        for layer in lift_layers(model).values():
            layer.values.mul_(0.5)


CHANGES: dict[str, Callable[[Any, Path], Any]] = {
    "another adapter": lambda m, place: m.set_adapter("more"),
    "there and back": lambda m, place: (m.set_adapter("more"), m.set_adapter("default")),
    "scaled": lambda m, place: scale_adapter(m, 0.5),
    "refreshed": lambda m, place: refresh_mask(m),
    "deleted": lambda m, place: m.delete_adapter("default"),
    "loaded in its place": lambda m, place: m.load_adapter(place / "other"),
    "loaded by name": lambda m, place: load_adapter(m, place / "other"),
    "a state dict": lambda m, place: m.load_state_dict(torch.load(place / "state.pt")),
    "unloaded": lambda m, place: unload_adapter(m),
    "stepped": step,
    "copied": lambda m, place: m.add_adapter("ref", m.peft_config["default"]),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", swept(["dense", "nf4", "int8"], "dense"))
def test_a_change_is_seen(base: Path, tmp_path: Path, kind: str, change: str) -> None:
    model = two(base, tmp_path / "adapter", kind)
    other = attached(base, kind)
    move(other, seed=5)
    other.save_pretrained(tmp_path / "other")
    torch.save(other.state_dict(), tmp_path / "state.pt")
    wanted = logits(copy_of(model, CHANGES[change], tmp_path))
    model.merge_adapter()
    merged = logits(model)
    assert torch.equal(logits(copy.deepcopy(model).eval()), merged)
    CHANGES[change](model, tmp_path)
    assert torch.allclose(logits(model), wanted, atol=1e-5)
    model.merge_adapter()
    assert torch.allclose(logits(model), wanted, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model), wanted)


def test_what_is_saved_is_the_adapter(base: Path, tmp_path: Path) -> None:
    model = trained(base, tmp_path / "adapter", "nf4")
    wanted = logits(model)
    model.merge_adapter(dtype="bfloat16")
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load_adapter(load(base, "nf4"), tmp_path / "saved")), wanted)
    before = {name: layer.index for name, layer in lift_layers(model).items()}
    model.unmerge_adapter()
    again = trained(base, tmp_path / "again", "nf4")
    refresh_mask(again)
    model.merge_adapter()
    refresh_mask(model)  # from what is trained, not from what is kept
    for name, layer in lift_layers(again).items():
        assert torch.equal(layer.index.columns, lift_layers(model)[name].index.columns)
    assert any(lift_layers(model)[name].index is not index for name, index in before.items())


@pytest.mark.parametrize("tokens", [(), (5, 9)], ids=["matrices", "and tokens"])
def test_it_is_not_trained(base: Path, tokens: tuple[int, ...]) -> None:
    """Tokens of the embedding are not merged, and would be trained alone."""
    model = attached(base, "nf4", trainable_token_indices=tokens).train()
    model.merge_adapter()
    with pytest.raises(UserError, match="call unmerge_adapter first"):
        model(IDS, labels=IDS)
    with torch.no_grad():
        model(IDS, labels=IDS)
    model.unmerge_adapter()
    model(IDS, labels=IDS).loss.backward()
    model.merge_adapter()
    scale_adapter(model, 2.0)  # which lets go of it
    model(IDS, labels=IDS).loss.backward()
