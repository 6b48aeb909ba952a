"""Which Linears are trained, what is left of the blocks, and when too much would be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import load
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from leanlift import LiftConfig, UserError, get_lift_model
from leanlift.model import lift_layers


class OtherLinear(nn.Linear):
    """As FP8 and QAT libraries have them."""


class PackedLinear(nn.Module):
    """As GPTQ's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(8, 64, dtype=torch.int32))


class Matrix(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


STRANGE: dict[str, tuple[Callable[[int], nn.Module], str, str]] = {
    "subclass": (
        lambda rows: OtherLinear(64, rows),
        "is a OtherLinear, a Linear of a kind",
        "up_proj (OtherLinear)",
    ),
    "matrix": (
        lambda rows: Matrix(rows, 64),
        r"holds a matrix \(\d+, 64\) of a Matrix",
        "up_proj (Matrix)",
    ),
    "experts": (
        lambda rows: Matrix(8, rows // 8, 64),
        r"holds fused expert weights \(8, \d+, 64\)",
        "up_proj (Matrix)",
    ),
    "convolution": (
        lambda rows: nn.Conv1d(64, rows, 1),
        "is a convolution with weights",
        "up_proj (Conv1d)",
    ),
}


NAME = r"model\.layers\.1\.mlp\.up_proj"


@pytest.mark.parametrize("case", STRANGE)
def test_blocks_whose_weights_are_mostly_not_read_are_refused(base: Path, case: str) -> None:
    build, match, _ = STRANGE[case]
    model = load(base, "dense")
    model.model.layers[1].mlp.up_proj = build(4096)
    with pytest.raises(UserError, match=rf"only \d+% .* {NAME} {match}.*target_modules"):
        get_lift_model(model, LiftConfig(approx_rank=8), progress=False)
    assert not lift_layers(model)
    named = LiftConfig(approx_rank=8, target_modules="attention")
    assert len(lift_layers(get_lift_model(model, named, progress=False))) == 8


@pytest.mark.parametrize("case", STRANGE)
def test_what_is_left_of_the_blocks_is_said(
    base: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    build, _, kind = STRANGE[case]
    model = load(base, "dense")
    model.model.layers[1].mlp.extra = build(64)
    get_lift_model(model, LiftConfig(approx_rank=8), progress=False)
    assert (
        "% of the weights in the blocks; frozen, being no Linears or read past them: "
        in caplog.text
    )
    assert kind.replace("up_proj", "extra") in caplog.text


def test_what_is_packed_is_refused(base: Path) -> None:
    model = load(base, "dense")
    model.model.layers[1].mlp.up_proj = PackedLinear()
    with pytest.raises(UserError, match=f"{NAME} is a PackedLinear with packed weights"):
        get_lift_model(model, LiftConfig(approx_rank=8), progress=False)


def test_a_linear_whose_weight_others_read_is_left_frozen_and_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The scan of Mamba takes the weights of three of its four Linears past their modules."""
    config = MambaConfig(hidden_size=64, num_hidden_layers=1, vocab_size=50, state_size=4)
    model = MambaForCausalLM(config)
    get_lift_model(model, LiftConfig(approx_rank=8, density=0.2), progress=False)
    trained = {name.rpartition(".")[2] for name in lift_layers(model)}
    assert "in_proj" in trained
    assert "dt_proj" not in trained
    assert "dt_proj (Linear)" in caplog.text
    assert "conv1d (Conv1d)" in caplog.text
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    for layer in lift_layers(model).values():
        assert layer.values.grad is not None
    with pytest.raises(UserError, match=r"dt_proj is read by MambaMixer itself"):
        get_lift_model(MambaForCausalLM(config), LiftConfig(target_modules=("dt_proj",)))
