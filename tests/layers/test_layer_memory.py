"""What a layer keeps in memory, and whom it disturbs."""

from __future__ import annotations

import copy
import gc
from collections import Counter

import pytest
import torch
from helpers import (
    LargestTensor,
    make_base,
    make_block,
    make_lift,
    make_linear4bit,
    random_flat,
    retire,
    saved_nbytes,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from leanlift.layers import LiftLinear, Workspace
from leanlift.layers.autograd import KeepInput
from leanlift.weights.places import weight_tensors


@pytest.mark.parametrize("kind", ["nf4", "int8", "dense"])
def test_autograd_keeps_the_bytes_of_x_alone(kind: str) -> None:
    lift = make_lift(make_base(kind, 97, 257, bias=True))
    for x in (torch.randn(2, 3, 257), torch.randn(4, 257).bfloat16().requires_grad_()):
        assert saved_nbytes(lift, x) == x.nbytes
        with torch.autocast("cpu", torch.bfloat16):
            assert saved_nbytes(lift, x) == 2 * x.numel()


def test_the_thread_between_the_two_functions_has_no_memory() -> None:
    lift = make_lift(make_linear4bit(65, 48))
    carrier = KeepInput.apply(torch.randn(7, 48), lift.values, lift, lift.values_gradient)
    assert carrier.shape == (7, 65)
    assert carrier.untyped_storage().nbytes() == carrier.element_size()


@pytest.mark.parametrize("change", ["values", "mask"])
def test_a_change_between_forward_and_backward_is_noticed(change: str) -> None:
    lift = make_lift(make_linear4bit(65, 48))
    y = lift(torch.randn(3, 48, requires_grad=True)).sum()
    if change == "values":
        with torch.no_grad():
            lift.values.add_(1)
    else:
        lift.change_mask(torch.arange(lift.index.count))
    with pytest.raises(RuntimeError, match="changed between its forward and its backward"):
        y.backward()


def test_an_entry_is_rounded_once() -> None:
    """fp32 rows (INT8) under a 16-bit computation: W + offset, then one rounding."""
    lift = make_lift(make_base("int8", 65, 64))
    dense = lift.effective.rows(0, 65)
    assert torch.equal(lift.effective_weight(torch.bfloat16), dense.bfloat16())


@pytest.mark.parametrize("needed", [True, False], ids=["scratch", "none"])
def test_the_scratch_is_the_only_dense_tensor_left_after_a_step(needed: bool) -> None:
    def dense() -> set[int]:
        gc.collect()
        tensors = [found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter)]
        return {tensor.data_ptr() for tensor in tensors if tensor.numel() >= 160 * 192}

    lift = make_lift(make_linear4bit(160, 192))
    lift.workspace.stands_for = "cuda" if needed else None
    x, before = torch.randn(4, 192, requires_grad=True), dense()
    lift(x).sum().backward()
    if not needed:
        assert dense() == before
        assert lift.scratch.nbytes == 0
        return
    scratch = lift.scratch.take(160, 192, torch.float32, torch.device("cpu"))
    assert dense() - before == {scratch.data_ptr()}
    assert lift.scratch.nbytes == 4 * 160 * 192


@pytest.mark.parametrize("density", [0.05, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_patched_new_tensor_is_what_the_scratch_would_hold(
    density: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leanlift.layers.frozen.tile_rows", lambda *_: 64)
    monkeypatch.setattr("leanlift.layers.gradient_rows.tile_rows", lambda *_: 64)
    lift = make_lift(make_linear4bit(320, 192), density=density)
    trained = set(lift.index.to_flat().tolist())
    retired = torch.tensor([flat for flat in range(0, 320 * 192, 997) if flat not in trained])
    retire(lift, retired, torch.ones(retired.numel()))
    before = [t.clone() for t in weight_tensors(lift.base)]
    own = lift.effective_weight(dtype)
    lift.workspace.stands_for = "cuda"
    assert torch.equal(own, lift.effective_weight(dtype))
    assert all(map(torch.equal, weight_tensors(lift.base), before))


def test_no_operation_of_a_step_makes_more_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanlift.layers.frozen.tile_rows", lambda *_: 64)
    monkeypatch.setattr("leanlift.layers.gradient_rows.tile_rows", lambda *_: 64)
    lift = make_lift(make_linear4bit(320, 192))
    lift.workspace.stands_for = "cuda"
    scratch = lift.scratch.take(320, 192, torch.float32, torch.device("cpu"))
    x = torch.randn(4, 192, requires_grad=True)
    with LargestTensor([scratch, *weight_tensors(lift.base)]) as operations:
        lift(x).sum().backward()
    assert 0 < operations.numel <= 64 * 192


def _block_gradients(block: nn.Sequential) -> list[Tensor]:
    return [layer.values.grad.clone() for layer in block if isinstance(layer, LiftLinear)]


@pytest.mark.parametrize(("reentrant", "last"), [(False, 2), (True, 3)], ids=["new", "reentrant"])
def test_checkpointing_repeats_no_matmul_that_nobody_needs(
    reentrant: bool, last: int, rebuilt: Counter[LiftLinear]
) -> None:
    """Non-reentrant recomputation stops once the last layer has its input back: that layer is
    rebuilt for forward and backward alone. GELU needs the output of the first one again."""
    block, x = make_block(Workspace()), torch.randn(3, 48, requires_grad=True)
    block(x).square().sum().backward()
    expected, expected_x, x.grad = _block_gradients(block), x.grad, None
    block.zero_grad()
    rebuilt.clear()
    checkpoint(block, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, expected_x)
    assert all(map(torch.equal, _block_gradients(block), expected))
    assert (rebuilt[block[0]], rebuilt[block[2]]) == (3, last)


def test_two_models_do_not_disturb_each_other() -> None:
    blocks, x = [make_block(Workspace(), seed) for seed in (1, 2)], torch.randn(3, 48)
    alone = []
    for block in blocks:
        block(x).square().sum().backward()
        alone.append(_block_gradients(block))
        block.zero_grad()
    hidden = [block[0](x) for block in blocks]
    outputs = [block[2](block[1](h)) for block, h in zip(blocks, hidden, strict=True)]
    for block, y, expected in zip(blocks, outputs, alone, strict=True):
        y.square().sum().backward()
        assert all(map(torch.equal, _block_gradients(block), expected))


def test_a_deep_copy_is_independent_and_shares_one_scratch_of_its_own() -> None:
    block, x = make_block(Workspace()), torch.randn(3, 48)
    block[0].change_mask(random_flat(96, 48, block[0].index.count, seed=8))
    expected = block(x)
    twin = copy.deepcopy(block)
    assert torch.equal(twin(x), expected)
    assert twin[0].workspace is twin[2].workspace is not block[0].workspace
    twin[0].values.data.add_(1)
    twin[2].base.weight.data.zero_()
    assert torch.equal(block(x), expected)
    assert not torch.equal(twin(x), expected)


def test_moving_to_the_same_device_changes_nothing() -> None:
    lift, x = make_lift(make_linear4bit(65, 48)), torch.randn(3, 48)
    lift.change_mask(random_flat(65, 48, lift.index.count, seed=8))
    values, flat, expected = lift.values, lift.index.to_flat(), lift(x)
    assert lift.to(torch.device("cpu")).values is values
    assert torch.equal(lift.index.to_flat(), flat)
    assert torch.equal(lift(x), expected)
