"""Optimizer state as tensors and plain numbers: it comes back exactly, or is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from leanlift import UserError
from leanlift.optim import SavedState, SparseAdamW, check_saved, restore_state, saved_state

KINDS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "torch": lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.9, 0.95)),
    "torch fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd with momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "bitsandbytes": lambda p: bnb.optim.AdamW8bit(p, lr=1e-2),
    "sparse": lambda p: SparseAdamW(p, lr=1e-2),
    "sparse 8 bit": lambda p: SparseAdamW(p, lr=1e-2, moments="8bit", seed=3),
}


def build(kind: str) -> tuple[list[tuple[str, nn.Parameter]], torch.optim.Optimizer]:
    torch.manual_seed(0)
    named = [(f"layer.{i}.values", nn.Parameter(torch.randn(5000 + i))) for i in range(3)]
    groups = [
        {"params": [named[0][1], named[1][1]], "weight_decay": 0.1},
        {"params": [named[2][1]], "weight_decay": 0.0},
    ]
    return named, KINDS[kind](groups)


def rebuilt(kind: str, values: list[torch.Tensor]) -> Any:
    """A fresh optimizer over parameters with these values, and the parameters."""
    again, fresh = build(kind)
    for (_, parameter), value in zip(again, values, strict=True):
        parameter.data.copy_(value)
    return again, fresh


def assert_same(named: Any, again: Any) -> None:
    for (name, one), (_, other) in zip(named, again, strict=True):
        assert torch.equal(one, other), name


def train(named: Any, optimizer: Any, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for _, parameter in named:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_continues_bit_for_bit_from_tensors_and_json(kind: str) -> None:
    named, optimizer = build(kind)
    train(named, optimizer, range(3))
    saved = saved_state(optimizer, named)
    assert saved is not None
    pointers = [tensor.untyped_storage().data_ptr() for tensor in saved.tensors.values()]
    assert len(set(pointers)) == len(pointers)
    tensors = {name: tensor.clone() for name, tensor in saved.tensors.items()}
    facts = json.loads(json.dumps(saved.facts))
    values = [parameter.detach().clone() for _, parameter in named]
    train(named, optimizer, range(3, 6))

    again, fresh = rebuilt(kind, values)
    for group in fresh.param_groups:
        group["lr"] = 5.0  # the saved one counts
    restore_state(fresh, again, SavedState(tensors, facts))
    for group, restored in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        for key, value in group.items():
            if key != "params":
                assert restored[key] == value
                assert type(restored[key]) is type(value), key
    train(again, fresh, range(3, 6))
    assert_same(named, again)


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_without_a_gradient_so_far_has_no_state(kind: str) -> None:
    """Such as one of a part that no batch has reached yet."""
    named, optimizer = build(kind)
    reached = [named[0], named[2]]
    train(reached, optimizer, range(3))
    saved = saved_state(optimizer, named)
    assert saved is not None
    counts = {name: parameter.numel() for name, parameter in named}
    check_saved(saved, counts)
    tensors = {name: tensor.clone() for name, tensor in saved.tensors.items()}
    facts = json.loads(json.dumps(saved.facts))
    values = [parameter.detach().clone() for _, parameter in named]
    train(named, optimizer, range(3, 6))
    again, fresh = rebuilt(kind, values)
    restore_state(fresh, again, SavedState(tensors, facts))
    train(again, fresh, range(3, 6))
    assert_same(named, again)
    for unstarted in [], ["layer.0.values"], ["other"], "layer.1.values":
        with pytest.raises(UserError, match="optimizer state is damaged"):
            check_saved(SavedState(tensors, {**facts, "unstarted": unstarted}), counts)


def test_another_optimizer_or_other_parameters_are_refused() -> None:
    named, optimizer = build("torch")
    train(named, optimizer, range(1))
    saved = saved_state(optimizer, named)
    assert saved is not None
    with pytest.raises(UserError, match=r"holds the state of torch.AdamW, this run uses bitsand"):
        restore_state(build("bitsandbytes")[1], build("bitsandbytes")[0], saved)
    _, other = build("torch")
    renamed = [("other", p) for g in other.param_groups for p in g["params"]]
    with pytest.raises(UserError, match="made for other parameters or groups"):
        restore_state(other, renamed, saved)


def test_state_that_is_not_plain_is_left_to_others() -> None:
    named, optimizer = build("torch")
    train(named, optimizer, range(1))
    assert saved_state(optimizer, named[:1]) is None  # a parameter without a name
    optimizer.state[named[0][1]]["more"] = object()
    assert saved_state(optimizer, named) is None
    del optimizer.state[named[0][1]]["more"]
    optimizer.param_groups[0]["lr"] = torch.tensor(1.0)
    assert saved_state(optimizer, named) is None


COUNTS = {f"layer.{i}.values": 5000 + i for i in range(3)}


def saved_after(kind: str, steps: int = 3) -> SavedState:
    named, optimizer = build(kind)
    train(named, optimizer, range(steps))
    saved = saved_state(optimizer, named)
    assert saved is not None
    tensors = {name: tensor.clone() for name, tensor in saved.tensors.items()}
    return SavedState(tensors, json.loads(json.dumps(saved.facts)))


def damaged_tensors(saved: SavedState) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Every tensor in every way in which it can be wrong."""
    for name, tensor in saved.tensors.items():
        rest = {key: value for key, value in saved.tensors.items() if key != name}
        is_step = name.endswith(".step")
        yield f"{name} gone", rest
        yield f"{name} renamed", {**rest, name + "x": tensor}
        yield f"{name} of nobody", {**saved.tensors, "nobody.exp_avg": tensor}
        if tensor.is_floating_point():
            small = name.endswith(("exp_avg", "_sq", "absmax", "absmax1", "absmax2"))
            for bad in (float("nan"), float("inf"), -float("inf"), *([3e38] if small else [])):
                changed = tensor.clone()
                changed.view(-1)[-1] = bad
                yield f"{name} with {bad}", {**rest, name: changed}
        if is_step:
            for bad in (-1.0, 0.5, 4.0):
                yield f"{name} {bad}", {**rest, name: torch.full_like(tensor, bad)}
            continue
        yield f"{name} shorter", {**rest, name: tensor[:-1].clone()}
        yield f"{name} longer", {**rest, name: torch.cat([tensor, tensor[:1]])}
        yield f"{name} in a row", {**rest, name: tensor[None]}
        other = torch.int64 if tensor.is_floating_point() else torch.float32
        if name.rpartition(".")[2] != "state1" and name.rpartition(".")[2] != "state2":
            yield f"{name} of {other}", {**rest, name: tensor.to(other)}
        if name.endswith(("_sq", "absmax", "absmax1", "absmax2")):
            changed = tensor.clone()
            changed[0] = -1.0
            yield f"{name} negative", {**rest, name: changed}


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_can_be_wrong(kind: str) -> None:
    saved = saved_after(kind)
    check_saved(saved, COUNTS, 3)
    optional = kind == "sgd with momentum"  # of which nobody says what it needs
    tried = 0
    for what, tensors in damaged_tensors(saved):
        if optional and what.endswith("renamed"):
            continue
        tried += 1
        with pytest.raises(UserError, match="optimizer state is damaged") as caught:
            check_saved(SavedState(tensors, saved.facts), COUNTS, 3)
        assert "\n" not in str(caught.value), what
    assert tried >= 18
    with pytest.raises(UserError, match="trains no parameter"):
        check_saved(saved, {"other": 1}, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_no_option_or_number_can_be_another(kind: str) -> None:
    saved = saved_after(kind)
    for key, value in saved.facts["groups"][0]["options"].items():
        facts = copy.deepcopy(saved.facts)
        other: Any = not value if isinstance(value, bool) else 17
        facts["groups"][0]["options"][key] = other if key != "lr" else float("nan")
        named, optimizer = build(kind)
        if key == "moments":
            match = "has moments 17"
        else:
            match = rf"has {key}=" if key != "lr" else "its lr is nan"
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(UserError, match=match):
            restore_state(optimizer, named, SavedState(saved.tensors, facts))
        assert optimizer.state_dict() == before
    for key in saved.facts["groups"][0]["options"]:
        if key in ("lr", "moments"):
            continue
        facts = copy.deepcopy(saved.facts)
        del facts["groups"][0]["options"][key]
        named, optimizer = build(kind)
        restore_state(optimizer, named, SavedState(saved.tensors, facts))  # as this run has it
        train(named, optimizer, range(3, 4))


@pytest.mark.parametrize(
    "facts",
    [
        None,
        [],
        {},
        {"groups": [], "numbers": {}},
        {"optimizer": "x", "groups": {}, "numbers": {}},
        {"optimizer": "x", "groups": [1], "numbers": {}},
        {"optimizer": "x", "groups": [{"params": "a", "options": {}}], "numbers": {}},
        {"optimizer": "x", "groups": [{"params": ["a", "a"], "options": {}}], "numbers": {"a": {}}},
        {"optimizer": "x", "groups": [{"params": [[]], "options": {}}], "numbers": {}},
        {"optimizer": "x", "groups": [{"params": ["a"], "options": {}}], "numbers": {"b": {}}},
        {"optimizer": "x", "groups": [{"params": ["a"], "options": {}}], "numbers": {"a": []}},
    ],
    ids=str,
)
def test_facts_of_another_form_are_refused(facts: Any) -> None:
    with pytest.raises(UserError, match="optimizer state is damaged"):
        check_saved(SavedState({}, facts), {"a": 3})
