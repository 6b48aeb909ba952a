"""The state of SparseAdamW and of paged Adam follows its entries."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

from leanlift import UserError
from leanlift.optim import SparseAdamW, check_remappable, remap_entries
from leanlift.optim.moments import own_moments

COUNT = 5003


def stepped(kind: Any, **options: Any) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    parameter = nn.Parameter(torch.zeros(COUNT))
    optimizer = kind([parameter], lr=1e-3, **options)
    for _ in range(5):
        parameter.grad = torch.randn(COUNT) * torch.linspace(0.1, 1, COUNT)
        optimizer.step()
    return parameter, optimizer


def shuffled_source() -> Tensor:
    source = torch.randperm(COUNT)
    source[::10] = -1
    return source


def both(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    return [
        moment.clone()
        for moment in own_moments(optimizer.param_groups[0]["moments"]).read(
            optimizer.state[parameter]
        )
    ]


def test_fp32_moments_follow_bit_for_bit() -> None:
    parameter, optimizer = stepped(SparseAdamW)
    old, source = both(optimizer, parameter), shuffled_source()
    remap_entries(optimizer, parameter, source)
    new, stays = both(optimizer, parameter), source >= 0
    for before, after in zip(old, new, strict=True):
        assert torch.equal(after[stays], before[source[stays]])
    assert (new[0][~stays] == 0).all()
    assert (new[1][~stays] == old[1].max()).all()
    assert optimizer.state[parameter]["step"] == 5


def test_eight_bit_moments_follow_within_their_own_precision() -> None:
    parameter, optimizer = stepped(SparseAdamW, moments="8bit")
    old, source = both(optimizer, parameter), shuffled_source()
    remap_entries(optimizer, parameter, source)
    new, stays = both(optimizer, parameter), source >= 0
    for before, after in zip(old, new, strict=True):
        wanted, got = before[source[stays]], after[stays]
        # The widest step of either map is 0.0141 of the block's largest value.
        assert (got - wanted).abs().max() <= 0.0142 / 2 * before.abs().max() * 1.01
        assert (got - wanted).norm() <= 0.05 * wanted.norm()
    assert (new[0][~stays] == 0).all()  # exactly: the next update is clamped
    torch.testing.assert_close(new[1][~stays], old[1].max().expand(int((~stays).sum())))
    parameter.grad = torch.full((COUNT,), 100.0)
    before = parameter.detach().clone()
    optimizer.step()
    assert (parameter - before)[~stays].abs().max() <= 1e-3 * (1 + 1e-3)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("bits", ["", "8bit", "32bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_paged_adam_follows(name: str, bits: str) -> None:
    """On a CPU bitsandbytes falls back to ordinary memory, in the same layout."""
    parameter, optimizer = stepped(getattr(bnb.optim, f"Paged{name}{bits}"))
    check_remappable(optimizer)
    state = optimizer.state[parameter]
    assert (state["state1"].dtype == torch.uint8) == (bits == "8bit")
    source = torch.arange(COUNT)
    source[7] = -1
    old = state["state1"].clone()
    remap_entries(optimizer, parameter, source)
    keeps = torch.arange(COUNT) // 256 != 0
    if bits == "8bit":
        assert state["state1"][7] == 127
        assert (state["state1"][keeps] == old[keeps]).float().mean() > 0.99
    else:
        assert state["state1"][7] == 0
        assert torch.equal(state["state1"][8:], old[8:])


@pytest.mark.parametrize("kind", [bnb.optim.PagedLion8bit, bnb.optim.PagedAdEMAMix8bit])
def test_other_paged_optimizers_are_refused(kind: Any) -> None:
    with pytest.raises(UserError, match="cannot move the state of"):
        check_remappable(kind([nn.Parameter(torch.zeros(3))]))


def test_adafactor_is_refused() -> None:
    with pytest.raises(UserError, match="cannot move the state of Adafactor"):
        check_remappable(torch.optim.Adafactor([nn.Parameter(torch.zeros(3))]))
