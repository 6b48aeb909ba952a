"""Bytes of every optimizer that can be planned for, against the tensors themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from leanlift import UserError
from leanlift.defaults import SPARSE_OPTIMIZERS
from leanlift.measure import LiveBytes
from leanlift.optim import SparseAdamW, optimizer_nbytes, state_nbytes, update_nbytes
from leanlift.optim.moments import OWN_MOMENTS
from leanlift.optim.nbytes import _RULES, CHUNK_TENSORS

LENGTHS = ([300, 4095, 4096, 10001], [10001, 4096, 17], [700, 700, 700], [1])


def vectors(lengths: list[int], dtype: torch.dtype) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.zeros(length, dtype=dtype)) for length in lengths]
    for vector in made:
        vector.grad = torch.ones_like(vector)
    return made


def optimizer_of(optim: str, over: list[nn.Parameter], **more: Any) -> torch.optim.Optimizer:
    """What a run makes for the name."""
    if optim in SPARSE_OPTIMIZERS:
        return SparseAdamW(over, moments=SPARSE_OPTIMIZERS[optim])
    kind, options = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments("x", optim=optim))
    return kind(over, **{**options, **more})


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optim", _RULES)
def test_state_is_that_of_the_tensors(optim: str, dtype: torch.dtype) -> None:
    for lengths in LENGTHS:
        over = vectors(lengths, dtype)
        optimizer = optimizer_of(optim, over)
        optimizer.step()
        planned = optimizer_nbytes(optim, lengths, dtype.itemsize)
        assert state_nbytes(optimizer) == planned, lengths


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optim", [name for name in _RULES if name not in SPARSE_OPTIMIZERS])
def test_an_update_makes_what_the_rule_says(optim: str, dtype: torch.dtype) -> None:
    """On a CPU, and in the way in which torch goes over all vectors at once on a GPU."""
    for lengths in LENGTHS:
        for cuda in (False, True) if optim == "adamw_torch" else (False,):
            more = {"foreach": cuda} if optim == "adamw_torch" else {}
            optimizer = optimizer_of(optim, vectors(lengths, dtype), **more)
            optimizer.step()  # makes the state
            with LiveBytes() as live:
                optimizer.step()
            assert live.peak == update_nbytes(optim, lengths, dtype.itemsize, cuda), lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optim", SPARSE_OPTIMIZERS)
def test_an_update_of_ours_makes_a_few_chunks(
    optim: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk, lengths = 2**12, [2**16, 300]
    optimizer = optimizer_of(optim, vectors(lengths, dtype))
    for group in optimizer.param_groups:
        assert group["chunk"] * 4 * CHUNK_TENSORS == update_nbytes(optim, [2**30], 4, True)
        group["chunk"], group["betas"] = chunk, (0.9, 0.999)  # with which newcomers are clamped
    monkeypatch.setattr("leanlift.optim.nbytes.CHUNK", chunk)
    rule = update_nbytes(optim, lengths, dtype.itemsize, False)
    lean = optim == "sparse_adamw" and dtype == torch.float32  # everything is read in place
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
    kept = [grad.clone() for grad in grads]
    for grad in grads:
        grad.zero_()
    optimizer.step()
    for grad, nonzero in zip(grads, kept, strict=True):
        grad.copy_(nonzero)
    for state in optimizer.state.values():
        state["step"] += 500
    for least in (0.4, 0.0 if lean else 0.3):  # all are newcomers, and none is
        with LiveBytes() as live:
            optimizer.step()
        assert least * rule <= live.peak <= rule
    assert update_nbytes(optim, [100], 4, True) == CHUNK_TENSORS * 4 * 100


def test_an_optimizer_without_a_rule_is_refused() -> None:
    for rule in (optimizer_nbytes, lambda *args: update_nbytes(*args, cuda=True)):
        with pytest.raises(UserError, match="optim=sgd cannot be planned: expected one of") as said:
            rule("sgd", [3], 4)
        assert all(f" {name}" in str(said.value) for name in _RULES)


def test_what_a_run_offers_can_be_planned() -> None:
    assert set(SPARSE_OPTIMIZERS) <= set(_RULES)
    assert set(SPARSE_OPTIMIZERS.values()) == set(OWN_MOMENTS)
