"""SparseAdamW: AdamW in chunks, with 8-bit moments and bf16 values around one pure step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from stepping import COUNT, VARIANTS, gradients, start, train
from torch import Tensor, nn

from leanlift import UserError
from leanlift.measure import LiveBytes
from leanlift.optim import (
    SparseAdamW,
    adamw_nbytes,
    adamw_update,
    remap_entries,
)
from leanlift.optim.arithmetic import Step, by_operations

# --- The same as AdamW ---------------------------------------------------------------------


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)])
def test_fp32_agrees_with_torch_in_fp64(betas: tuple[float, float]) -> None:
    ours, exact = start(), nn.Parameter(start().detach().double())
    options: dict[str, Any] = {"betas": betas, "eps": 1e-6, "weight_decay": 0.1}
    got = train(SparseAdamW([ours], **options), ours, gradients(50))
    wanted = train(torch.optim.AdamW([exact], **options), exact, gradients(50))
    assert (got - wanted).norm() <= 1e-6 * wanted.norm()
    moved = wanted - start().detach()
    assert (got - wanted).norm() <= 1e-5 * moved.norm()


@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_the_chunk_does_not_change_the_result(moments: str) -> None:
    results = []
    for chunk in (256, 1024, 2**18):
        parameter = start()
        optimizer = SparseAdamW([parameter], weight_decay=0.1, moments=moments, chunk=chunk)
        grads = gradients(5)
        for grad in grads[:4]:
            grad[::7] = 0  # newcomers of the last step
        results.append(train(optimizer, parameter, grads))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("newcomers", [0, 40, COUNT], ids=["none", "some", "all"])
@pytest.mark.parametrize("way", ["as on a CPU", "by operations"])
def test_a_step_is_the_formula_in_fp64(way: str, newcomers: int) -> None:
    value, grad, first, second = (
        scale * gradient for scale, gradient in zip((1, 5, 1, 1), gradients(4), strict=True)
    )
    second = second**2
    first[:newcomers] = second[:newcomers] = 0
    lr, (beta1, beta2), eps, decay, step = 1e-2, (0.9, 0.999), 1e-6, 0.1, 300
    v, g, m, s = (tensor.double() for tensor in (value, grad, first, second))
    m, s = beta1 * m + (1 - beta1) * g, beta2 * s + (1 - beta2) * g * g
    move = lr * (m / (1 - beta1**step)) / ((s / (1 - beta2**step)).sqrt() + eps)
    assert not newcomers or float(move[:newcomers].abs().max()) > 1.5 * lr
    move[:newcomers] = move[:newcomers].clamp(-lr, lr)
    v = v * (1 - lr * decay) - move
    options = step, lr, (beta1, beta2), eps, decay
    if way == "by operations":
        by_operations(value, grad, first, second, Step(*options))
    else:
        adamw_update(value, grad, first, second, *options)
    for got, wanted in ((value, v), (first, m), (second, s)):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("dtype", "moments"), VARIANTS)
def test_step_parameter_is_step(dtype: torch.dtype, moments: str) -> None:
    whole, single = ([start(dtype), start(dtype, 300)] for _ in range(2))
    by_step = SparseAdamW([{"params": [p]} for p in whole], moments=moments)
    by_parameter = SparseAdamW([{"params": [p]} for p in single], moments=moments)
    for number in range(3):
        for p, q in zip(whole, single, strict=True):
            p.grad = gradients(1, p.numel(), number)[0].to(dtype)
            q.grad = p.grad.clone()
        by_step.step()
        for q in reversed(single):
            by_parameter.step_parameter(q)
            q.grad = None
        by_parameter.step()  # finds no gradient
    for p, q in zip(whole, single, strict=True):
        assert torch.equal(p, q)
        assert by_step.state[p]["step"] == by_parameter.state[q]["step"] == 3


def test_a_closure_is_evaluated_with_gradients() -> None:
    parameter = start()
    optimizer = SparseAdamW([parameter])

    def closure() -> Tensor:
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert optimizer.state[parameter]["step"] == 1


# --- Resuming ------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "moments"), VARIANTS)
def test_a_resumed_run_continues_bit_for_bit(dtype: torch.dtype, moments: str) -> None:
    grads = gradients(8)
    straight = start(dtype)
    first = SparseAdamW([straight], moments=moments, seed=7, chunk=1024, weight_decay=0.1)
    train(first, straight, grads[:4])
    saved = copy.deepcopy(first.state_dict())
    resumed = nn.Parameter(straight.detach().clone())
    wanted = train(first, straight, grads[4:], 4)

    second = SparseAdamW([resumed])  # other options: the saved ones come back
    second.load_state_dict(saved)
    loaded, before = second.state[resumed], saved["state"][0]
    assert loaded.keys() == before.keys()
    for name, tensor in before.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].data_ptr() != tensor.data_ptr()
    assert torch.equal(train(second, resumed, grads[4:], 4), wanted)


def test_a_copied_optimizer_keeps_its_options() -> None:
    parameter = start()
    optimizer = SparseAdamW([parameter], moments="8bit", seed=3)
    train(optimizer, parameter, gradients(2))
    twin = copy.deepcopy(optimizer)
    (other,) = twin.param_groups[0]["params"]
    other.grad = parameter.grad.clone()  # type: ignore[union-attr]
    twin.step_parameter(other)
    optimizer.step()
    assert torch.equal(other, parameter)


def test_torch_s_own_state_can_be_continued() -> None:
    parameter = start()
    theirs = torch.optim.AdamW([parameter], betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0)
    train(theirs, parameter, gradients(3))
    ours = nn.Parameter(parameter.detach().clone())
    optimizer = SparseAdamW([ours])
    optimizer.load_state_dict(theirs.state_dict())
    wanted = train(theirs, parameter, gradients(3, seed=5), 3)
    torch.testing.assert_close(train(optimizer, ours, gradients(3, seed=5), 3), wanted)


# --- Newcomers -----------------------------------------------------------------------------


def first_move(optimizer: torch.optim.Optimizer, size: float, clear: Any) -> float:
    """The largest move, in learning rates, of entry 0 cleared by `clear` after 300 steps."""
    (parameter,) = optimizer.param_groups[0]["params"]
    for grad in gradients(300, parameter.numel()):
        parameter.grad = grad.to(parameter.dtype)
        optimizer.step()
    clear(optimizer, parameter)
    before = parameter[0].item()
    parameter.grad = torch.full_like(parameter, size)
    optimizer.step()
    return abs(parameter[0].item() - before) / optimizer.param_groups[0]["lr"]


def zero_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    optimizer.state[parameter]["exp_avg"][0] = 0
    optimizer.state[parameter]["exp_avg_sq"][0] = 0


def follow(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    source = torch.arange(parameter.numel())
    source[0] = -1
    remap_entries(optimizer, parameter, source)


@pytest.mark.parametrize("size", [1e-2, 1.0, 1e3])
def test_a_newcomer_s_first_update_is_at_most_the_learning_rate(size: float) -> None:
    def move(kind: Any, clear: Any, **more: Any) -> float:
        parameter = nn.Parameter(torch.zeros(600))
        options: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0}
        return first_move(kind([parameter], **options, **more), size, clear)

    assert 1.6 <= move(torch.optim.AdamW, zero_state) <= 6.7
    limit = 1 + 1e-3  # the difference of two fp32 values
    assert 1 / limit <= move(SparseAdamW, zero_state) <= limit  # clamped to it, not below
    for moments in ("float32", "8bit"):
        assert move(SparseAdamW, follow, moments=moments) <= limit


def test_a_newcomer_does_not_touch_its_neighbours() -> None:
    results = []
    for clear in (False, True):
        parameter = start()
        optimizer = SparseAdamW([parameter])
        train(optimizer, parameter, gradients(20))
        if clear:
            zero_state(optimizer, parameter)
        results.append(train(optimizer, parameter, gradients(3, seed=9), 20))
    assert torch.equal(results[0][1:], results[1][1:])
    assert results[0][0] != results[1][0]


# --- Memory and mistakes -------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "moments"), VARIANTS)
def test_temporaries_are_a_few_chunks(dtype: torch.dtype, moments: str) -> None:
    count, chunk = 2**22, 2**16
    parameter = nn.Parameter(torch.zeros(count, dtype=dtype))
    optimizer = SparseAdamW([parameter], moments=moments, chunk=chunk)
    parameter.grad = torch.ones(count, dtype=dtype)
    with LiveBytes() as live:
        optimizer.step()
    # fp32 copies: values, gradients, two moments, update, noise, and what quantizing takes.
    assert live.peak - adamw_nbytes(count, moments) <= 9 * 4 * chunk


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be 0 or more, got -1.0"),
        ({"eps": -1.0}, "eps must be 0 or more"),
        ({"weight_decay": float("nan")}, "weight_decay must be 0 or more"),
        ({"betas": (1.0, 0.9)}, "betas must be two numbers"),
        ({"betas": (0.9, -0.1)}, "betas must be two numbers"),
        ({"moments": "4bit"}, "moments must be one of float32, 8bit, got '4bit'"),
        ({"rounding": "up"}, "rounding must be one of"),
        ({"chunk": 1000}, "chunk must be a positive multiple of 256 entries, got 1000"),
        ({"chunk": 0}, "chunk must be a positive multiple of 256"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SparseAdamW([start()], **options)
    with pytest.raises(UserError, match=message):  # also where one group has them
        SparseAdamW([{"params": [start()], **options}])


def test_parameters_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="got contiguous float16"):
        SparseAdamW([nn.Parameter(torch.zeros(3, dtype=torch.float16))])
    with pytest.raises(UserError, match="got non-contiguous float32"):
        SparseAdamW([nn.Parameter(torch.zeros(3, 4).T)])
    with pytest.raises(UserError, match="add it with add_param_group"):
        SparseAdamW([start()]).step_parameter(start())
    with pytest.raises(UserError, match="moments must be one of"):
        adamw_nbytes(3, "4bit")


def test_a_gradient_or_a_state_of_another_size_is_refused() -> None:
    parameter = start()
    optimizer = SparseAdamW([parameter])
    train(optimizer, parameter, gradients(1))
    parameter.data = torch.zeros(10)
    with pytest.raises(UserError, match=r"shape \(10,\), got \(5003,\)"):
        optimizer.step()
    parameter.grad = torch.zeros(10)
    with pytest.raises(UserError, match="should have 10 entries, got 5003"):
        optimizer.step()
    saved = optimizer.state_dict()
    with pytest.raises(UserError, match="should have 5 entries, got 5003"):
        SparseAdamW([nn.Parameter(torch.zeros(5))]).load_state_dict(saved)
    saved["param_groups"][0]["moments"] = "8bit"
    with pytest.raises(UserError, match="should hold 8bit moments, got exp_avg"):
        SparseAdamW([start()]).load_state_dict(saved)
