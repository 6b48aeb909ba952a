"""What settings need and how long a step takes, by card."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from families import config_of

from leanlift import UserError
from leanlift.cli import main
from leanlift.cli.parsing import read_flags
from leanlift.cli.settings import read_command
from leanlift.plan.cards import card_named
from leanlift.plan.time import step_time
from leanlift.training import plan_of
from leanlift.training.by_card import by_card
from leanlift.training.changes import Change

ASKED = ["--max_length", "64", "--density", "0.2"]
SIZES = (0.58, 0.9, 1.2, 1.5)
"""In GiB: from a little more than the context to what is more than enough."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    config = config_of(
        "llama", num_hidden_layers=8, vocab_size=8192, hidden_size=2048, intermediate_size=5632,
        num_attention_heads=16, num_key_value_heads=4,
    )  # fmt: skip
    config.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def table(model: Path) -> Any:
    asked = read_command("plan", ["--model_name_or_path", str(model), *ASKED])
    card = card_named("rtx4090")
    return asked, by_card(asked.args, asked.sft, dict.fromkeys(SIZES, card), asked=asked.given)


@pytest.mark.thorough
def test_each_line_needs_less_and_is_what_its_plan_says(table: Any) -> None:
    asked, found = table
    needed = [line.plan.needed for line in found.settings]
    assert len(needed) > 3
    assert all(a - b >= 0.01 * a for a, b in itertools.pairwise(needed))
    assert found.settings[0].keys == {}
    last = found.settings[-1]
    settings = Change(last.keys, "")((asked.args, asked.sft))
    assert plan_of(*settings, True).needed == last.plan.needed


@pytest.mark.thorough
def test_a_time_is_there_where_a_plan_fits(table: Any) -> None:
    _, found = table
    card = found.cards[SIZES[0]]
    shown = 0
    for line in found.settings:
        for gib in SIZES:
            time = line.time(card, gib)
            assert (time is not None) == line.plan.fits(gib)
            if time is not None:
                shown += 1
                assert time.seconds == step_time(line.plan.work, card).seconds
    assert 0 < shown < len(SIZES) * len(found.settings)
    for gib, fit in found.fitted.items():
        time = found.fitted_time(gib)
        assert (fit is None) == (time is None)
        assert fit is None or fit.plan.fits(gib)
    assert found.fitted[SIZES[0]] is None
    as_asked = found.settings[0].time(card, SIZES[-1])
    fitted = found.fitted_time(SIZES[-1])
    assert fitted is not None
    assert as_asked is not None
    assert fitted.seconds <= as_asked.seconds


@pytest.mark.thorough
def test_state_comes_with_its_blocks_before_fewer_entries_are_trained(table: Any) -> None:
    """Of a step of eight micro-batches too, which is the command's default."""
    asked, found = table
    assert asked.sft.gradient_accumulation_steps == 8
    streamed = next(line for line in found.settings if line.keys.get("stream_state"))
    assert streamed.plan.holds_for["gradient_accumulation_steps"] == 8
    assert streamed.plan.categories["gradients"] == 0
    tight = [fit for fit in found.fitted.values() if fit and fit.args.stream_state]
    assert all(fit.args.density == asked.args.density for fit in tight)


@pytest.mark.thorough
def test_it_is_asked_for_on_the_command_line(
    model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = ["plan", "--model_name_or_path", str(model), *ASKED, "--table", "--fit", "1.2GB"]
    assert main([*argv, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["cards"] == {"1.2": "RTX 3060"}
    assert said["settings"][0]["changed"] == {}
    assert said["settings"][0]["seconds"]["1.2"] is None
    assert said["settings"][-1]["seconds"]["1.2"] > said["fitted"]["1.2"]["seconds"] > 0
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "as asked for" in text
    assert "chosen by --fit" in text
    assert "1 row × 64 tokens, 8 times" in text
    assert max(map(len, text.splitlines())) <= 80
    pytest.importorskip("matplotlib")
    place = tmp_path / "table.svg"
    assert main([*argv, "--card", "rtx4090", "--plot", str(place)]) == 0
    assert "RTX 4090, 1.2 GB" in place.read_text()


def test_what_it_cannot_be_asked_with_is_said_first(model: Path) -> None:
    with pytest.raises(UserError, match="--table plans many settings, of which --save cannot"):
        read_flags("plan", ["--table", "--save", "run.yaml"], {})
    with pytest.raises(UserError, match="ask for one at a time"):
        read_flags("plan", ["--table", "--max_length", "max"], {})


def test_it_is_about_cards(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model_name_or_path", str(model), "--table", "--cpu"]) == 2
    assert "--table is about cards: leave --cpu and use_cpu out." in capsys.readouterr().err
