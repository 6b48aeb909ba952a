"""LiftLinear against a dense fp64 oracle: values, gradients, and what it keeps in memory.

Tolerances are relative: the error against fp64 may be at most twice the error of a plain
`nn.Linear` of the same dtype on the same numbers, plus a tenth of that dtype's epsilon.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from helpers import (
    assert_as_good_as_plain_torch,
    effective_oracle,
    make_base,
    make_dense,
    make_lift,
    make_linear4bit,
    pass_by_rows,
    random_flat,
    random_inputs,
    retire,
    retired_flat,
    run_pass,
    saved_nbytes,
)

from leanlift.layers import FrozenLinear, LiftLinear, Workspace
from leanlift.sparse import SegmentedIndex
from leanlift.weights.quantized import frozen_weight

SHAPES = [(128, 192), (65, 48), (97, 257)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

each_base = pytest.mark.parametrize("kind", ["nf4", "int8", "dense"])


# --- values and gradients -------------------------------------------------------------------


@each_base
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=["128x192", "65x48", "97x257"])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 1, 3)], ids=["1d", "2d", "3d", "4d"])
def test_output_and_gradients_are_as_good_as_plain_torch(
    kind: str, dtype: torch.dtype, shape: tuple[int, int], leading: tuple[int, ...]
) -> None:
    lift = make_lift(make_base(kind, *shape, dtype=dtype, bias=True))
    x, grad_y = random_inputs(lift, leading, dtype)
    ours = assert_as_good_as_plain_torch(lift, x, grad_y)
    assert (ours.y.shape, ours.y.dtype) == (grad_y.shape, dtype)
    assert (ours.x.shape, ours.x.dtype) == (x.shape, dtype)
    assert ours.values.dtype == torch.float32


@each_base
def test_autocast_decides_the_dtype_of_the_computation(kind: str) -> None:
    lift = make_lift(make_base(kind, 97, 257, bias=True))
    ours = assert_as_good_as_plain_torch(lift, *random_inputs(lift), autocast=True)
    assert (ours.y.dtype, ours.x.dtype) == (torch.bfloat16, torch.float32)


def test_several_tiles_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 64..127, a tile of their own, hold no entry at all."""
    base, flat = make_dense(200, 48), random_flat(200, 48, 500)
    flat = flat[(flat < 64 * 48) | (flat >= 128 * 48)]
    index = SegmentedIndex.from_flat(flat, (200, 48))
    lift = LiftLinear(base, frozen_weight(base), index, Workspace())
    lift.values.data.normal_()
    x, grad_y = random_inputs(lift)
    whole = run_pass(lift, x, grad_y)
    monkeypatch.setattr("leanlift.layers.frozen.tile_rows", lambda *_: 64)
    monkeypatch.setattr("leanlift.layers.gradient_rows.tile_rows", lambda *_: 64)
    tiled = assert_as_good_as_plain_torch(lift, x, grad_y)
    torch.testing.assert_close(tiled.values, whole.values)
    assert torch.equal(tiled.y, whole.y)


def test_eval_no_grad_and_inference_mode_give_the_same_output() -> None:
    lift, x = make_lift(make_linear4bit(65, 48, bias=True)), torch.randn(3, 48)
    trained = lift(x)
    assert torch.equal(lift.eval()(x), trained)
    with torch.no_grad():
        assert torch.equal(lift(x), trained)
    with torch.inference_mode():
        assert torch.equal(lift(x), trained)


def test_training_goes_on_after_inference_mode() -> None:
    lift, x = make_lift(make_linear4bit(65, 48)), torch.randn(3, 48)
    with torch.inference_mode():
        expected = lift(x)
    lift(x).sum().backward()
    assert torch.equal(lift(x), expected)


def test_an_input_without_gradient_needs_no_second_rebuild(rebuilt: Counter[LiftLinear]) -> None:
    lift = make_lift(make_linear4bit(65, 48))
    x, grad_y = random_inputs(lift)
    expected, lift.values.grad = run_pass(lift, x, grad_y).values, None
    rebuilt.clear()
    lift(x).backward(grad_y)
    assert torch.equal(lift.values.grad, expected)
    assert rebuilt[lift] == 1


def test_frozen_values_still_pass_the_gradient_on() -> None:
    lift = make_lift(make_linear4bit(65, 48))
    x, grad_y = random_inputs(lift)
    expected = run_pass(lift, x, grad_y)
    lift.values.requires_grad_(False).grad = None
    lift(x.requires_grad_()).backward(grad_y)
    assert torch.equal(x.grad, expected.x)
    assert saved_nbytes(lift, x) == 0


def test_gradients_accumulate() -> None:
    lift = make_lift(make_linear4bit(65, 48))
    first, (x, grad_y) = random_inputs(lift), random_inputs(lift)
    total = run_pass(lift, x, grad_y).values + run_pass(lift, *first).values
    lift(x).backward(grad_y)
    assert torch.equal(lift.values.grad, total)


def test_a_frozen_linear_computes_with_the_base_alone_and_keeps_nothing() -> None:
    base = make_linear4bit(65, 48, bias=True)
    frozen = FrozenLinear(base, frozen_weight(base), Workspace())
    dense, x = frozen.weight_tiles.rows(0, 65), torch.randn(3, 48, requires_grad=True)
    torch.testing.assert_close(frozen(x), torch.nn.functional.linear(x, dense, base.bias))
    (grad_x,) = torch.autograd.grad(frozen(x).sum(), x)
    torch.testing.assert_close(grad_x, dense.sum(0).expand(3, 48), rtol=1e-4, atol=1e-5)
    assert saved_nbytes(frozen, x) == 0


def test_wrong_shapes_are_refused() -> None:
    lift = make_lift(make_dense(65, 48))
    with pytest.raises(ValueError, match=r"expected an input \[\.\.\., 48\], got \(3, 65\)"):
        lift(torch.zeros(3, 65))
    with pytest.raises(ValueError, match="expected 156 positions, got 3"):
        lift.change_mask(torch.arange(3))
    with pytest.raises(ValueError, match="expected retired positions outside the mask"):
        retire(lift, lift.index.to_flat()[:1], torch.ones(1))


# --- the mask changes -----------------------------------------------------------------------


@each_base
def test_a_mask_change_leaves_the_effective_weight_as_it_is(kind: str) -> None:
    """Round after round of training and changes; retired entries take part in everything."""
    lift = make_lift(make_base(kind, 65, 48, bias=True))
    values, count = lift.values, lift.index.count
    for _ in range(4):
        lift.values.data.add_(0.1 * torch.randn(count))
        before = lift.effective.rows(0, 65).clone()
        score = torch.rand(65 * 48)
        score[lift.index.to_flat()[::2]] += 1
        score[lift.index.to_flat()[1::2]] -= 1
        if lift.retired_index is not None:
            score[lift.retired_index.to_flat()[::4]] += 1
        wanted = score.topk(count).indices.sort().values
        change = lift.change_mask(wanted)
        assert change.churn == 0.5
        assert lift.values is values
        assert torch.equal(lift.index.to_flat(), wanted)
        assert torch.equal(lift.effective.rows(0, 65), before)
        assert_as_good_as_plain_torch(lift, *random_inputs(lift))
    assert retired_flat(lift).numel() > count


@each_base
def test_effective_tiles_equal_the_effective_weight(kind: str) -> None:
    lift = make_lift(make_base(kind, 130, 257))
    lift.change_mask(random_flat(130, 257, lift.index.count, seed=9))
    tiles, oracle = lift.effective, effective_oracle(lift)
    assert tiles.shape == (130, 257)
    dense = lift.effective_weight(torch.float32)
    for start, stop in [(0, 130), (0, 64), (13, 77), (129, 130)]:
        rows = tiles.rows(start, stop)
        assert torch.equal(rows, dense[start:stop])
        torch.testing.assert_close(rows.double(), oracle[start:stop], rtol=2e-7, atol=1e-12)


@pytest.mark.thorough
def test_a_real_sized_layer() -> None:
    """4096 x 11008 in bf16 NF4, 5 %, 4 tokens, within 1e-6 of the oracle."""
    lift = make_lift(make_linear4bit(4096, 11008, dtype=torch.bfloat16))
    inputs = random_inputs(lift, (4,))
    assert max(run_pass(lift, *inputs).errors(pass_by_rows(lift, *inputs)).values()) < 1e-6
