"""Who reads the weight of a Linear in it, as far as its own settings let it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig

from leanlift import LiftConfig, get_lift_model
from leanlift.model import lift_layers
from leanlift.model.reading import read_by_parent


class Holder(nn.Module):
    """Reads weights under conditions of many kinds."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        for name in ("always", "other", "both", "either", "negated", "elsewhere", "asked", "inline",
                     "never", "learning"):  # fmt: skip
            setattr(self, name, nn.Linear(4, 4))
        self.parts, self.exact, self.mode = 1, False, "fast"
        for name, value in settings.items():
            setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.always.weight.data.T
        y = y @ self.both.weight if self.parts > 1 and self.exact else self.both(y)
        if self.parts > 1 or self.mode == "slow":
            y = y @ self.either.weight
        if not self.exact:
            y = self.negated(y)
        else:
            x = self.other(x)
            y = y @ self.negated.weight
        if self.exact and x.is_cuda:
            y = y @ self.elsewhere.weight
        if self.training:
            y = y @ self.learning.weight
        y = y.to(self.asked.weight.dtype).to(self.asked.weight.device)
        return y @ self.inline.weight if self.exact else self.never(y) + self.other(y)


ALWAYS = {"always", "learning"}


@pytest.mark.parametrize(
    ("settings", "read"),
    [
        ({}, set()),
        ({"exact": True}, {"negated", "elsewhere", "inline"}),
        ({"parts": 2}, {"either"}),
        ({"parts": 2, "exact": True}, {"both", "either", "negated", "elsewhere", "inline"}),
        ({"mode": "slow"}, {"either"}),
        ({"exact": None}, {"negated", "elsewhere", "inline"}),  # no setting that could be told
    ],
    ids=lambda given: str(sorted(given)),
)
def test_a_weight_is_read_where_the_settings_let_it(
    settings: dict[str, Any], read: set[str]
) -> None:
    holder = Holder(**settings)
    names = {f"part.{name}": module for name, module in holder.named_children()} | {"part": holder}
    found = {name for name, _ in holder.named_children() if read_by_parent(names, f"part.{name}")}
    assert found == ALWAYS | read


def test_what_has_no_parent_and_no_text_is_read_by_nobody() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    assert not read_by_parent(dict(model.named_modules()), "0")
    assert not read_by_parent({}, "gone.part")


@pytest.mark.parametrize(("exact", "count"), [(False, 4), (True, 2)])
def test_bloom_cuts_its_weights_where_it_is_told_to(exact: bool, count: int) -> None:
    config = BloomConfig(hidden_size=64, n_layer=1, n_head=4, vocab_size=64, pretraining_tp=2,
                         slow_but_exact=exact)  # fmt: skip
    model = get_lift_model(AutoModelForCausalLM.from_config(config),
                           LiftConfig(selector="magnitude"), progress=False)  # fmt: skip
    assert len(lift_layers(model)) == count
