"""The longest rows that a card has room for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import config_of

from leanlift import UserError
from leanlift.cli import main
from leanlift.cli.parsing import read_flags
from leanlift.training import LiftSFTConfig, RunArguments, plan_of
from leanlift.training.longest import MOST, UNIT, _Search, longest_rows

GIB = 2**30
CARDS = (0.61251, 0.6225, 0.6625, 0.7625)
"""In GiB: a tiny model's context, what cuBLAS works in, and a little more."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    config_of("llama", num_hidden_layers=4).save_pretrained(directory)
    return directory


class Counted(_Search):
    """A search over a rule in place of plans."""

    def __init__(self, rule: Callable[[int], float]) -> None:
        self.rule, self.needed, self.plans = rule, {}, 0

    def _of(self, tokens: int) -> int:
        assert tokens % UNIT == 0
        if tokens not in self.needed:
            self.plans += 1
            self.needed[tokens] = int(self.rule(tokens))
        return self.needed[tokens]


RULES: dict[str, Callable[[int], float]] = {
    "flat, then a line": lambda t: 5.5 * GIB + max(0.3 * GIB, 221e3 * t),
    "a line": lambda t: GIB + 1e5 * t,
    "quadratic": lambda t: GIB + t**2,
    "steps": lambda t: GIB + 1e9 * (t // 4096),
    "nothing more": lambda t: 2 * GIB,
}


@pytest.mark.parametrize("rule", RULES)
def test_the_longest_length_that_fits_is_found_in_few_plans(rule: str) -> None:
    search = Counted(RULES[rule])
    for gib in (1, 4, 6, 8, 12, 16, 24):
        found = search.longest(gib)
        fits = [t for t in range(UNIT, MOST + 1, UNIT) if RULES[rule](t) <= gib * GIB]
        assert found == (fits[-1] if fits else 0)
    assert search.plans < (60 if rule == "steps" else 35)


def told(model: Path, **more: Any) -> tuple[RunArguments, LiftSFTConfig]:
    args = RunArguments(model_name_or_path=str(model), dataset_name="rows", **more)
    return args, LiftSFTConfig(
        output_dir="none", per_device_train_batch_size=1, gradient_accumulation_steps=1,
        max_grad_norm=0.0, optim="sparse_adamw", use_cpu=True, bf16=False,
    )  # fmt: skip


@pytest.mark.thorough
def test_each_line_has_what_its_plan_says(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanlift.training.longest.MOST", 4096)
    args, sft = told(model)
    lines = longest_rows(args, sft, CARDS, cuda=True)
    assert lines[0].added is None
    assert lines[0].keys == {}
    assert [next(iter(line.added.keys)) for line in lines[1:] if line.added] == [
        "optim", "values_dtype", "tiled_mlp", "quantize_embeddings", "embedding_on_cpu",
        "activation_offloading", "stream_base", "optim_in_backward", "stream_state",
    ]  # fmt: skip
    assert lines[0].tokens[CARDS[0]] == 0
    tokens = lines[0].tokens[CARDS[1]]
    assert 0 < tokens < 4096
    for length, fits in ((tokens, True), (tokens + UNIT, False)):
        sft.max_length = length
        assert plan_of(args, sft, True).fits(CARDS[1]) == fits
    for line in lines:
        assert list(line.tokens.values()) == sorted(line.tokens.values())


@pytest.mark.thorough
def test_it_is_asked_for_on_the_command_line(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("leanlift.training.longest.MOST", 1024)
    argv = ["plan", "--model_name_or_path", str(model), "--fit", "0.6GB", "--max_length", "max"]
    assert main([*argv, "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert lines[0]["changed"] == {}
    assert all(set(line["max_length"]) == {"0.6"} for line in lines)
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "as asked for" in text
    assert "+ stream_base=true" in text
    assert max(map(len, text.splitlines())) <= 80


def test_what_it_cannot_be_asked_with_is_said() -> None:
    _, own = read_flags("plan", ["--max_length", "max"], {})
    assert own.longest
    with pytest.raises(UserError, match="max_length"):
        read_flags("train", ["--max_length", "max"], {})
    with pytest.raises(UserError, match="which --save cannot write one"):
        read_flags("plan", ["--max_length=max", "--save", "run.yaml"], {})


@pytest.mark.thorough
def test_it_is_drawn(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("leanlift.training.longest.MOST", 512)
    place = tmp_path / "lengths.svg"
    argv = ["plan", "--model_name_or_path", str(model), "--max_length", "max", "--fit", "1GB"]
    assert main([*argv, "--plot", str(place)]) == 0
    assert "1 GB" in place.read_text()
