"""Optimizer state as tensors and plain numbers: it comes back exactly, or is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from leanlift import UserError
from leanlift.optim import SavedState, SparseAdamW, restore_state, saved_state

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

    again, fresh = build(kind)
    for (_, parameter), value in zip(again, values, strict=True):
        parameter.data.copy_(value)
    for group in fresh.param_groups:
        group["lr"] = 5.0  # the saved one counts
    restore_state(fresh, again, SavedState(tensors, facts))
    for group, restored in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        for key, value in group.items():
            if key != "params":
                assert restored[key] == value
                assert type(restored[key]) is type(value), key
    train(again, fresh, range(3, 6))
    for (name, one), (_, other) in zip(named, again, strict=True):
        assert torch.equal(one, other), name


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
