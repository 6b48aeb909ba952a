"""Weights and gradients of a kind that has been made: the same bytes as made each time."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from families import config_of
from sweeps import swept
from transformers import AutoModelForCausalLM

from leanlift import LiftConfig
from leanlift.layers import FrozenLinear
from leanlift.measure import LiveBytes
from leanlift.plan.base import without_packing_search
from leanlift.plan.fake import StepBytes, attach_fake, fake_tensors, held_scratch, step_peak
from leanlift.plan.loss import loss_of_all_tokens
from leanlift.plan.pieces import first_pieces
from leanlift.plan.remembered import Most, Remembered, remembering
from leanlift.weights.quantized import WeightFormat

WIDE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 5}
BASES: dict[str, Any] = {
    "llama": WIDE,
    "llama, two widths": {**WIDE, "num_key_value_heads": 4},
    "qwen3, experts": {"num_hidden_layers": 5},
    "gpt2, turned": {"num_hidden_layers": 5},
}


class Forgetful(dict[Any, int]):
    """Keeps nothing."""

    def __setitem__(self, key: Any, value: int) -> None:
        pass


def step(
    base: str,
    kind: str,
    device: str,
    in_backward: bool,
    tokens: int = 48,
    most: Most | None = None,
) -> StepBytes:
    fmt = WeightFormat(kind, "bfloat16" if kind != "dense" else "float32", 64)
    lift = LiftConfig(approx_rank=8, density_pattern={"down_proj": 0.1} if "widths" in base else {})
    config = config_of(base.replace(", two widths", ""), **BASES[base])
    with without_packing_search(), fake_tensors():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        attach_fake(model, lift, fmt, workspace=first_pieces(device))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return step_peak(
            model.train(),
            loss_of_all_tokens,
            2,
            tokens,
            in_backward,
            accumulate=not in_backward,
            most=most,
        )


@pytest.mark.parametrize("in_backward", swept([True, False], True))
@pytest.mark.parametrize("device", swept(["cuda", "cpu"], "cuda"))
@pytest.mark.parametrize("kind", swept(["nf4", "int8", "dense"], "nf4"))
@pytest.mark.parametrize("base", swept(BASES, "llama, two widths"))
def test_what_is_remembered_has_the_bytes_of_what_is_made(
    base: str, kind: str, device: str, in_backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {"rows": 0, "all": 0}
    of_kind = Remembered.rows

    def rows(self: Remembered, layer: FrozenLinear, *rest: Any) -> Any:
        known = len(self._most)
        found = of_kind(self, layer, *rest)
        made["rows"] += len(self._most) > known
        made["all"] += 1
        return found

    monkeypatch.setattr(Remembered, "rows", rows)
    remembered = step(base, kind, device, in_backward)
    assert 0 < made["rows"] < made["all"] / 3

    def forgetful(model: Any, live: LiveBytes, most: Most) -> Any:
        return nullcontext(Remembered(live, Forgetful()))

    monkeypatch.setattr("leanlift.plan.fake.remembering", forgetful)
    assert step(base, kind, device, in_backward) == remembered


def test_what_left_something_behind_is_made_again() -> None:
    """A scratch that had to grow for the first weight is there for the second."""
    fmt = WeightFormat("nf4", "bfloat16", 64)
    with without_packing_search(), fake_tensors():
        model = AutoModelForCausalLM.from_config(config_of("llama"), dtype=torch.float32)
        attach_fake(model, LiftConfig(approx_rank=8), fmt, workspace=first_pieces("cuda"))
        layer = next(m for m in model.modules() if isinstance(m, FrozenLinear))
        with LiveBytes() as live, remembering(model, live, {}):
            stand_in = layer.workspace.stand_in
            assert isinstance(stand_in, Remembered)
            known = []
            for _ in range(3):
                layer.effective_weight(torch.bfloat16)
                known.append(len(stand_in._most))
    assert known == [0, 1, 1]
    assert layer.workspace.stand_in is None


def test_later_plans_make_what_earlier_ones_have_made_no_more() -> None:
    """Of one search, whose settings differ in whatever decides the bytes."""
    kinds = [
        ("nf4", "cuda", 48),
        ("nf4", "cuda", 32),
        ("fp4", "cuda", 32),
        ("int8", "cuda", 32),
        ("nf4", "cpu", 32),
    ]
    most: Most = {}
    known = []
    for kind, device, tokens in [*kinds, *kinds]:
        alone = step("llama, two widths", kind, device, True, tokens)
        assert step("llama, two widths", kind, device, True, tokens, most) == alone
        known.append(len(most))
    assert known[:5] == sorted(set(known[:5]))  # each has made something of its own
    assert known[5:] == known[4:5] * 5


def test_a_gradient_of_a_kind_that_was_looked_at_takes_as_much_again() -> None:
    most: Most = {}
    peaks = []
    for _ in range(2):
        with LiveBytes() as live:
            gradient = torch.ones(3000)
            Remembered(live, most).look(gradient)
            peaks.append(live.peak)
    assert peaks[0] == peaks[1] > gradient.nbytes


def test_a_scratch_that_a_step_makes_is_there_in_the_next() -> None:
    """Of dense gradients on a CPU, where the weights themselves need none: in no figure of it."""
    fmt = WeightFormat("nf4", "float32", 64)
    with without_packing_search(), fake_tensors():
        model = AutoModelForCausalLM.from_config(config_of("llama"), dtype=torch.float32)
        attach_fake(model, LiftConfig(density=0.3), fmt, workspace=first_pieces("cpu"))
        model.train()
        steps = [step_peak(model, loss_of_all_tokens, 1, 16, True, False) for _ in range(2)]
    assert held_scratch(model) > 0
    assert steps[0] == steps[1]
