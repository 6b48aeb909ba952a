"""8-bit moments and bf16 values: near fp32, rounded without bias."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from stepping import COUNT, gradients, train
from torch import Tensor, nn

from leanlift.optim import (
    TABLES_NBYTES,
    SparseAdamW,
    adamw_nbytes,
    state_nbytes,
)
from leanlift.optim.arithmetic import round_stochastically, uniform_noise


def test_eight_bit_moments_stay_near_fp32_and_no_further_than_bitsandbytes() -> None:
    def run(kind: Any, **more: Any) -> Tensor:
        parameter = nn.Parameter(torch.zeros(COUNT))
        optimizer = kind([parameter], betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0, **more)
        return train(optimizer, parameter, gradients(50))

    exact = run(SparseAdamW)
    ours = ((run(SparseAdamW, moments="8bit") - exact).norm() / exact.norm()).item()
    theirs = ((run(bnb.optim.AdamW8bit) - exact).norm() / exact.norm()).item()
    assert 0 < ours <= 0.03
    assert ours <= 1.1 * theirs


def test_a_zero_moment_stays_zero_and_a_small_second_moment_does_not_become_zero() -> None:
    parameter = nn.Parameter(torch.zeros(600))
    optimizer = SparseAdamW([parameter], moments="8bit")
    parameter.grad = torch.ones(600)
    parameter.grad[:512:2] = 0  # among others
    parameter.grad[512:] = 0  # a block of nothing
    parameter.grad[1] = 1e-6  # second moment 1e-12 of the block's largest
    optimizer.step()
    state = optimizer.state[parameter]
    first = state["exp_avg_codes"] != 127
    assert not first[:512:2].any()
    assert first[3:512:2].all()
    assert not state["exp_avg_sq_codes"][:512:2].any()
    assert state["exp_avg_sq_codes"][1] > 0
    assert state["exp_avg_absmax"][2] == state["exp_avg_sq_absmax"][2] == 0
    before = parameter.detach().clone()
    parameter.grad.zero_()
    optimizer.step()
    assert torch.isfinite(parameter).all()
    assert torch.equal(parameter[:512:2], before[:512:2])
    assert torch.equal(parameter[512:], before[512:])


@pytest.mark.parametrize("count", [1, 255, 256, 257, 5003, 10**6])
@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_bytes_are_those_of_the_tensors(count: int, moments: str) -> None:
    parameters = [nn.Parameter(torch.zeros(count)) for _ in range(2)]
    optimizer = SparseAdamW(parameters, moments=moments)
    for parameter in parameters:
        parameter.grad = torch.ones(count)
    optimizer.step()
    for state in optimizer.state.values():
        assert sum(t.numel() * t.element_size() for t in state.values()) == adamw_nbytes(
            count, moments
        )
    tables = TABLES_NBYTES if moments == "8bit" else 0
    assert state_nbytes(optimizer) == 2 * adamw_nbytes(count, moments) + tables
    if moments == "8bit" and count == 10**6:
        assert adamw_nbytes(count, moments) <= 2.1 * count


# --- bf16 values ---------------------------------------------------------------------------


def bits(*patterns: int) -> Tensor:
    return torch.tensor(patterns, dtype=torch.int64).to(torch.int32).view(torch.float32)


def test_stochastic_rounding_is_unbiased_and_takes_both_neighbours() -> None:
    draws = 20000
    tiny = torch.finfo(torch.float32).tiny
    for number, value in enumerate((1.001, -1.001, 3e38, -3e-5, 1e-39, tiny * 0.3, 1.0039)):
        exact = torch.full((draws,), value)
        got = round_stochastically(exact, uniform_noise(draws, exact.device, number))
        lower = (exact[:1].view(torch.int32) & -65536).view(torch.float32).double()
        upper = ((exact[:1].view(torch.int32) & -65536) + 65536).view(torch.float32).double()
        assert set(got.double().tolist()) == {lower.item(), upper.item()}
        gap = (upper - lower).abs().item()
        share = abs(exact[0].double().item() - lower.item()) / gap
        mean = ((got.double() - lower).abs() / gap).mean().item()
        assert abs(mean - share) <= 5 * (share * (1 - share) / draws) ** 0.5, value


def test_values_that_bf16_holds_stay_whatever_the_noise() -> None:
    exact = torch.cat([torch.randn(1000).bfloat16().float(), bits(0, 0x00010000, 0x7F7F0000)])
    exact = torch.cat([exact, -exact])
    for noise in (0, 1, 65535):
        got = round_stochastically(exact, torch.full(exact.shape, noise, dtype=torch.int32))
        assert torch.equal(got.float(), exact)


def test_no_carry_makes_a_finite_value_infinite() -> None:
    largest = torch.finfo(torch.float32).max
    extreme = torch.tensor([largest, -largest, 3.3895e38, -3.3895e38])
    got = round_stochastically(extreme, torch.full((4,), 65535, dtype=torch.int32))
    assert torch.isfinite(got).all()
    limit = torch.finfo(torch.bfloat16).max
    assert got[:2].tolist() == [limit, -limit]
    odd = torch.cat([torch.tensor([torch.inf, -torch.inf]), bits(0x7FFFFFFF, 0xFFFFFFFF)])
    got = round_stochastically(odd, torch.full((4,), 65535, dtype=torch.int32))
    assert got[:2].tolist() == [torch.inf, -torch.inf]
    assert got[2:].isnan().all()


def test_noise_is_uniform_and_a_function_of_its_key() -> None:
    cpu = torch.device("cpu")
    noise = uniform_noise(100_001, cpu, 1, 2, 3, 4)
    assert noise.dtype == torch.int32
    assert noise.min() >= 0
    assert noise.max() <= 65535
    assert abs(noise.double().mean() - 32767.5) <= 5 * 65536 / (12 * 100_001) ** 0.5
    assert torch.equal(noise, uniform_noise(100_001, cpu, 1, 2, 3, 4))
    for other in ((0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0), (-1, 2, 3, 4)):
        assert (noise == uniform_noise(100_001, cpu, *other)).float().mean() < 1e-3


def test_a_bf16_quadratic_stalls_with_nearest_and_not_with_stochastic_rounding() -> None:
    target = torch.linspace(2, 3, 2000)
    errors = {}
    for rounding in ("nearest", "stochastic"):
        parameter = nn.Parameter(torch.ones(2000, dtype=torch.bfloat16))
        optimizer = SparseAdamW([parameter], lr=2e-3, rounding=rounding)
        for _ in range(1500):
            parameter.grad = (parameter.detach().float() - target).bfloat16()
            optimizer.step()
        errors[rounding] = (parameter.detach().float() - target).square().mean().sqrt().item()
    assert errors["nearest"] > 1  # it never left its start
    assert errors["stochastic"] < 0.02  # bf16's own step at 2 is 0.016
