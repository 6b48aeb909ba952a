"""A state dict of an attached model, as torch's, safetensors' and accelerate's tools use it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from safetensors.torch import load_model, save_model
from sweeps import swept
from tiny import load, make_tokenizer
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from trained import KINDS, attached, logits, move

from leanlift import LiftModel, Steps, refresh_mask, scale_adapter
from leanlift.model import lift_layers

IDS = torch.arange(3, 43).reshape(2, 20)
MORE: dict[str, dict[str, Any]] = {
    "plain": {},
    "ends in INT8": {"quantize_embeddings": True},
    "tokens": {"trainable_token_indices": (5, 9)},
}
CASES = [(kind, more) for kind in KINDS for more in MORE]


def refreshed(base: Path, kind: str, **config: Any) -> LiftModel:
    """With retired entries."""
    model = attached(base, kind, **config)
    move(model)
    refresh_mask(model)
    assert any(layer.settled_count for layer in lift_layers(model).values())
    return model


@pytest.mark.parametrize(("kind", "more"), swept(CASES, ("nf4+double", "ends in INT8")))
def test_the_same_base_takes_it_whole(base: Path, tmp_path: Path, kind: str, more: str) -> None:
    model = refreshed(base, kind, **MORE[more])
    wanted = logits(model)
    one, two = (attached(base, kind, **MORE[more]) for _ in range(2))
    one.load_state_dict(model.state_dict())
    assert torch.equal(logits(one), wanted)
    save_model(model, str(tmp_path / "model.safetensors"))
    load_model(two, str(tmp_path / "model.safetensors"))
    assert torch.equal(logits(two), wanted)


@pytest.mark.parametrize("kind", swept(["nf4", "nf4+double", "fp4", "int8"], "nf4"))
def test_numbers_of_another_base_are_not_mixed_in(base: Path, tmp_path: Path, kind: str) -> None:
    other = load(base, "dense")
    for parameter in other.parameters():
        parameter.data.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    state = attached(tmp_path / "other", kind).state_dict()
    with pytest.raises(RuntimeError, match="expected the numbers of the base that is loaded"):
        attached(base, kind).load_state_dict(state, strict=False)
    with pytest.raises(RuntimeError, match="load it without assign=True"):
        attached(base, kind).load_state_dict(attached(base, kind).state_dict(), assign=True)


def test_a_scale_comes_along(base: Path) -> None:
    model, other = refreshed(base, "nf4"), attached(base, "nf4")
    scale_adapter(model, 0.5)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    scale_adapter(model, 1.0)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("frozen", [False, True], ids=["trained alone", "whole"])
def test_torch_s_own_helpers_read_and_set_it(base: Path, frozen: bool) -> None:
    model, other = refreshed(base, "nf4"), attached(base, "nf4")
    state = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=not frozen))
    assert any(key.endswith(".base.weight") for key in state) == frozen
    set_model_state_dict(other, state, options=StateDictOptions(strict=frozen))
    assert torch.equal(logits(other), logits(model))


@pytest.mark.filterwarnings("ignore")
def test_a_distributed_checkpoint_is_right_or_refused(base: Path, tmp_path: Path) -> None:
    """It reads what the model at hand has: a fresh one has no place for retired entries."""
    model, fresh, other = refreshed(base, "dense"), attached(base, "dense"), None
    other = refreshed(base, "dense")
    dcp.save(model.state_dict(), checkpoint_id=tmp_path)
    state = fresh.state_dict()
    dcp.load(state, checkpoint_id=tmp_path)
    with pytest.raises(RuntimeError, match=r"settled\.values, .* is missing"):
        fresh.load_state_dict(state)
    for layer in lift_layers(other).values():
        layer.values.data.zero_()
    state = other.state_dict()
    dcp.load(state, checkpoint_id=tmp_path)
    other.load_state_dict(state)
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("kind", swept(KINDS, "nf4"))
def test_an_accelerator_s_checkpoint_goes_on_to_the_bit(
    base: Path, tmp_path: Path, kind: str
) -> None:
    def prepared(done: int) -> Any:
        accelerator, model = Accelerator(cpu=True), attached(base, kind, refresh_interval=2)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        model, optimizer = accelerator.prepare(model.train(), optimizer)
        return accelerator, model, optimizer, Steps(model, optimizer, done)

    def go(accelerator: Any, model: Any, optimizer: Any, steps: Steps, until: int) -> None:
        while steps.done < until:
            accelerator.backward(model.train()(IDS, labels=IDS).loss)
            steps.before()
            optimizer.step()
            optimizer.zero_grad()
            steps.after()

    first = prepared(0)
    go(*first, until=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first[0].save_state(str(tmp_path))
    go(*first, until=5)
    second = prepared(3)
    second[0].load_state(str(tmp_path))
    go(*second, until=5)
    assert torch.equal(logits(second[1]), logits(first[1]))
    assert second[0].unwrap_model(second[1]).get_base_model() is second[1].get_base_model()
