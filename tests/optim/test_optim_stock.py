"""Optimizer state follows its entries."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from leanlift import UserError
from leanlift.optim import check_remappable, remap_entries, state_nbytes

COUNT = 5000  # above bitsandbytes' 4096, below which it keeps fp32 state


def stepped(
    kind: type[torch.optim.Optimizer], **options: float
) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    parameter = nn.Parameter(torch.zeros(COUNT))
    optimizer = kind([parameter], lr=1e-3, **options)  # type: ignore[call-arg]
    for _ in range(5):
        parameter.grad = torch.randn(COUNT) * torch.linspace(0.1, 1, COUNT)
        optimizer.step()
    return parameter, optimizer


def shuffled_source() -> torch.Tensor:
    """Every tenth entry is new; the others come from anywhere."""
    source = torch.randperm(COUNT)
    source[::10] = -1
    return source


def test_torch_moments_follow_bit_for_bit() -> None:
    parameter, optimizer = stepped(torch.optim.AdamW)
    old = {key: optimizer.state[parameter][key].clone() for key in ("exp_avg", "exp_avg_sq")}
    source = shuffled_source()
    remap_entries(optimizer, parameter, source)
    new, stays = optimizer.state[parameter], source >= 0
    assert torch.equal(new["exp_avg"][stays], old["exp_avg"][source[stays]])
    assert torch.equal(new["exp_avg_sq"][stays], old["exp_avg_sq"][source[stays]])
    assert (new["exp_avg"][~stays] == 0).all()
    assert (new["exp_avg_sq"][~stays] == old["exp_avg_sq"].max()).all()
    assert new["step"] == 5


def test_eight_bit_moments_follow_within_their_own_precision() -> None:
    parameter, optimizer = stepped(bnb.optim.AdamW8bit)
    state = optimizer.state[parameter]
    assert state["state1"].dtype == torch.uint8

    def read(which: int) -> torch.Tensor:
        codes, scale, table = (state[f"{key}{which}"] for key in ("state", "absmax", "qmap"))
        return table[codes.long()] * scale.repeat_interleave(256)[:COUNT]

    old = {which: read(which) for which in (1, 2)}
    source = shuffled_source()
    remap_entries(optimizer, parameter, source)
    stays = source >= 0
    for which in (1, 2):
        wanted, got = old[which][source[stays]], read(which)[stays]
        # An entry is quantized again in a new block: half a step of the 8-bit map at most.
        step = (state[f"qmap{which}"].diff().max() / 2) * state[f"absmax{which}"].max()
        assert (got - wanted).abs().max() <= step
        assert (got - wanted).norm() <= 0.05 * wanted.norm()
    # bitsandbytes' CPU quantizer maps 0 to the code next to it.
    assert read(1)[~stays].abs().max() <= 1e-4 * state["absmax1"].max()
    torch.testing.assert_close(read(2)[~stays], old[2].max().expand(int((~stays).sum())))


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_a_newcomer_never_jumps(beta2: float) -> None:
    """Under an old step count zero moments give several times the learning rate; ours do not."""
    rate = 1e-3
    largest = {}
    for start in ("naive", "ours"):
        parameter = nn.Parameter(torch.zeros(100))
        optimizer = torch.optim.AdamW([parameter], lr=rate, betas=(0.9, beta2), weight_decay=0.0)
        torch.manual_seed(0)
        for _ in range(300):
            parameter.grad = torch.randn(100)
            optimizer.step()
        if start == "ours":
            source = torch.arange(100)
            source[0] = -1
            remap_entries(optimizer, parameter, source)
        else:
            optimizer.state[parameter]["exp_avg"][0] = 0
            optimizer.state[parameter]["exp_avg_sq"][0] = 0
        moves = []
        for _ in range(60):
            before = parameter[0].item()
            parameter.grad = torch.ones(100)
            optimizer.step()
            moves.append(abs(parameter[0].item() - before))
        largest[start] = max(moves) / rate
    assert largest["ours"] <= 1.0 + 1e-3
    if beta2 == 0.999:
        assert largest["naive"] > 3


def test_an_optimizer_that_has_not_stepped_has_nothing_to_move() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter])
    remap_entries(optimizer, parameter, torch.tensor([0, 1, -1]))
    assert not optimizer.state


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.SGD([nn.Parameter(torch.zeros(3))], momentum=0.9),
        torch.optim.AdamW([nn.Parameter(torch.zeros(3))], amsgrad=True),
        bnb.optim.Lion8bit([nn.Parameter(torch.zeros(3))]),
    ],
    ids=["sgd", "amsgrad", "lion"],
)
def test_an_optimizer_that_cannot_follow_is_refused(optimizer: torch.optim.Optimizer) -> None:
    with pytest.raises(UserError, match="cannot move the state of"):
        check_remappable(optimizer)


def test_state_bytes_are_those_of_the_tensors() -> None:
    _, optimizer = stepped(torch.optim.AdamW)
    assert state_nbytes(optimizer) == 2 * 4 * COUNT + 4
    _, optimizer = stepped(bnb.optim.AdamW8bit)
    blocks = -(-COUNT // 256)
    assert state_nbytes(optimizer) == 2 * (COUNT + 4 * blocks + 4 * 256)
    assert state_nbytes(None) == 0
