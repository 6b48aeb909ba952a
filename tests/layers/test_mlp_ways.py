"""Which modules are MLPs that can go over their tokens in pieces, and how long these are."""

# ruff: noqa: RET504 - forwards are written as transformers writes them

from __future__ import annotations

import pytest
import torch
from families import config_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from leanlift import LiftConfig, UserError, get_lift_model
from leanlift.layers.tiled_mlp import PIECES, pieces, use_tiled_mlp
from leanlift.model import tiled_mlp


def test_pieces_are_even_and_none_is_longer_than_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanlift.layers.tiled_mlp.LEAST", 1024)
    monkeypatch.setattr("leanlift.layers.tiled_mlp.MOST", 4096)
    for tokens in (1, 1024, 1025, 2048, 4096, 5000, 16384, 16385, 65536, 100_000):
        found = pieces(tokens)
        sizes = [stop - start for start, stop in found]
        assert sum(sizes) == tokens
        assert (found[0][0], found[-1][1]) == (0, tokens)
        assert max(sizes) - min(sizes) <= len(sizes)
        assert max(sizes) <= 4096
        assert len(found) == 1 if tokens <= 1024 else len(found) <= max(PIECES, tokens // 4096 + 1)


def test_a_model_without_one_is_refused() -> None:
    model = get_lift_model(
        AutoModelForCausalLM.from_config(config_of("qwen3, experts"), dtype=torch.float32),
        LiftConfig(selector="magnitude"),
        progress=False,
    )
    with pytest.raises(UserError, match=r"no MLP of this Qwen3Moe.*leave out tiled_mlp"):
        tiled_mlp(model)


def test_a_chain_that_mixes_tokens_is_no_mlp() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)
            self.act = nn.BatchNorm1d(64)

        def forward(self, hidden_states: Tensor) -> Tensor:
            hidden_states = self.one(hidden_states)
            hidden_states = self.act(hidden_states)
            hidden_states = self.two(hidden_states)
            return hidden_states

    model = Mixing()
    with pytest.raises(UserError, match="no MLP of this Mixing"):
        use_tiled_mlp(model)
    model.act = nn.GELU()
    assert use_tiled_mlp(model) == [""]
