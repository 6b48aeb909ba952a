"""`leanlift init`: rows and card are looked at, and what is written is taken as it is."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from snapshots import assert_screen
from sweeps import swept
from tiny import make_checkpoint

from leanlift.cli import init, main
from leanlift.cli.settings import parse_train
from leanlift.errors import UserError
from leanlift.training import look as looking
from leanlift.training import propose as proposing
from leanlift.training.arguments import LiftSFTConfig
from leanlift.training.look import LENGTHS, look
from leanlift.training.plan import plan_of
from leanlift.training.recipe import Section, recipe


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("init") / "Tiny-1B")


def rows_of(place: Path, rows: list[dict[str, Any]]) -> Path:
    path = place / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


ROWS = [
    {"prompt": "a" * (10 + 7 * (i % 30)), "completion": "b" * (5 + i % 9), "source": "x"}
    for i in range(90)
]


def test_the_screen_and_the_file(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    data = rows_of(tmp_path, ROWS)
    argv = ["init", "--model", str(base), "--data", str(data), "--card", "8GB", "--yes"]
    assert main(argv) == 0
    varies = {str(base): "MODELS/Tiny-1B", str(tmp_path): "HERE"}
    assert_screen(capsys.readouterr().out, "init", varies)
    assert_screen(Path("run.yaml").read_text(), "init-yaml", varies)
    assert main(argv) == 2
    assert "run.yaml exists already" in capsys.readouterr().err


@pytest.mark.parametrize("purpose", swept(init.PURPOSES, *list(init.PURPOSES)[:1]))
@pytest.mark.parametrize("card", swept(["8GB", "cpu"], "8GB"))
def test_what_is_written_is_what_was_planned(
    base: Path, tmp_path: Path, purpose: str, card: str
) -> None:
    data, place = rows_of(tmp_path, ROWS), tmp_path / "run.yml"
    argv = ["init", "--model", str(base), "--data", str(data), "--card", card]
    argv += ["--purpose", purpose, "--output", str(place), "--output_dir", "there"]
    assert main(argv) == 0
    args, sft = parse_train(["--config", str(place), "--use_cpu", "true"])
    wanted = proposing.PURPOSES[purpose].keys
    assert (args.density, sft.learning_rate) == (wanted["density"], wanted["learning_rate"])
    assert sft.num_train_epochs == wanted["num_train_epochs"]
    assert (sft.max_length, sft.output_dir) == (256, "there")
    assert ("use_cpu" in yaml.safe_load(place.read_text())) == (card == "cpu")
    assert plan_of(args, sft, cuda=card != "cpu").fits(8)


def test_a_model_out_of_reach_is_told_with_a_way_out() -> None:
    with pytest.raises(UserError, match=r"cannot be read: .*[^.]\. Expected a checkpoint's direct"):
        looking.positions_of("nobody/has-this")


def test_the_purposes_are_the_same_in_question_and_answer() -> None:
    found = {name: purpose.what for name, purpose in proposing.PURPOSES.items()}
    assert found == init.PURPOSES
    for purpose in proposing.PURPOSES.values():
        assert purpose.keys.keys() == purpose.why.keys()


@pytest.mark.thorough
def test_a_small_card_changes_what_is_proposed(base: Path, tmp_path: Path) -> None:
    found = look(str(base), str(rows_of(tmp_path, ROWS)))
    plain = proposing.propose(str(base), "rows", found, "answers", 8.0, "out")
    assert plain.taken == ()
    assert [each.change.keys for each in plain.bought] == [{"kept_blocks": 2}]
    card = (plain.bought[0].before - 2000) / 2**30
    made = proposing.propose(str(base), "rows", found, "answers", card, "out")
    assert made.plan.fits(card)
    keys = {key: value for section in made.sections for key, value in section.keys.items()}
    assert made.taken
    for step in made.taken:
        assert keys.items() >= step.change.keys.items()
        assert any(step.change.cost in why for s in made.sections for why in s.why.values())


# --- the rows ---------------------------------------------------------------------------------


def test_lengths_are_counted_and_few_are_cut(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [40] * 300 + [200] * 95 + [400] * 5
    rows = [{"prompt": "a" * (n - 6), "completion": "b" * 5} for n in lengths]  # and an end token
    path = rows_of(tmp_path, rows)
    found = look(str(base), str(path))
    assert sorted(set(found.lengths.tolist())) == [40, 200, 400]
    assert [line.split()[1] for line in found.histogram()] == ["300", "0", "95", "5"]
    assert found.cut(256) == 5
    assert found.max_length == 256, "the base has no more positions"
    looser = look(str(base), str(path))
    object.__setattr__(looser, "positions", 4096)
    assert looser.max_length == 512, "more than a hundredth would be cut at 256"
    assert looser.max_length in LENGTHS
    monkeypatch.setattr(looking, "LOOKED_AT", 50)
    sampled = look(str(base), str(path))
    assert (len(sampled.lengths), sampled.rows) == (50, 400)
    assert set(sampled.lengths.tolist()) == {40, 200}, "spread over the file"
    assert sampled.worst(256).tokens == 256, "a row that was not looked at may be longer"
    assert "of rows spread over all 400" in "\n".join(sampled.lines())


FORMS = {
    "prompts": [{"prompt": "a", "completion": "b"}],
    "plain texts": [{"text": "abc"}],
    "instructions": [{"instruction": "a", "output": "b"}],
}


@pytest.mark.parametrize("form", FORMS)
def test_the_form_of_the_rows_is_said(base: Path, tmp_path: Path, form: str) -> None:
    found = look(str(base), str(rows_of(tmp_path, FORMS[form] * 3)))
    assert found.form.startswith(form)
    assert all(len(line) <= 80 for line in found.lines())


# --- asking -----------------------------------------------------------------------------------


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, *answers: str) -> list[str]:
    pending, asked = list(answers), []

    def ask(question: str = "") -> str:
        asked.append(question)
        if not pending:
            raise EOFError
        return pending.pop(0)

    monkeypatch.setattr("builtins.input", ask)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    return asked


def test_what_is_missing_is_asked_for(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, place = rows_of(tmp_path, ROWS[:8]), tmp_path / "run.yaml"
    asked = on_a_terminal(monkeypatch, "", str(base), str(data), "", "cpu")
    monkeypatch.setattr(init, "_this_card", lambda: None)
    assert main(["init", "--output", str(place)]) == 0
    assert [question.splitlines()[-1].split(" (")[0] for question in asked] == [
        "Model", "Model", "Rows", "Purpose [answers]: ",
        "Memory of the card, such as 8GB, or cpu [cpu]: "
    ]  # fmt: skip
    assert yaml.safe_load(place.read_text())["num_train_epochs"] == 3


WRONG: dict[str, tuple[list[str], str]] = {
    "no model": ([], "leanlift init needs --model"),
    "no rows": (["--model", "m"], "leanlift init needs --data"),
    "no card": (["--model", "{base}", "--data", "{data}"], "leanlift init needs --card"),
    "another purpose": (["--purpose", "fun"], "expected a purpose among answers, style, text"),
    "no card of that size": (["--card", "big"], "size of a card such as 8GB"),
    "another kind of file": (["--output", "run.txt"], "a name such as run.yaml"),
    "no directory": (["--output", "no/run.yaml"], "there is no directory"),
    "no such rows": (["--model", "{base}", "--data", "no.jsonl"], "no.jsonl does not exist"),
    "no such model": (["--model", "./no", "--data", "{data}"], "the base ./no does not exist"),
    "an option": (["--modle", "m"], "--modle is no option of leanlift init"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_uses_are_one_sentence_before_anything_slow(
    wrong: str,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(init, "_propose", None)
    monkeypatch.setattr(init, "_this_card", lambda: None)
    data = rows_of(tmp_path, ROWS[:4])
    monkeypatch.chdir(tmp_path)
    argv, said = WRONG[wrong]
    begun = time.process_time()
    given = [word.format(base=base, data=data) for word in argv]
    assert main(["init", *given]) == 2
    assert time.process_time() - begun < 1
    message = capsys.readouterr().err
    assert said in message
    assert message.startswith("leanlift: ")
    assert message.count("\n") == 1
    assert not (tmp_path / "run.yaml").exists()


def test_the_input_may_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                           capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    on_a_terminal(monkeypatch)
    assert main(["init"]) == 2
    assert "the input has ended" in capsys.readouterr().err


# --- the file ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [2e-4, 1e-5, True, False, 8, "a: b # c", "yes", "1e-3", "null", ["q_proj", "v_proj"],
     {"down_proj": 0.1}, "ä", 'say "x"', "", "~"],
    ids=repr,
)  # fmt: skip
def test_a_value_comes_back_as_it_was(value: Any) -> None:
    text = recipe(["head"], [Section("a", {"key": value, "next": 1}, {"key": "a reason " * 9})])
    assert yaml.safe_load(text)["next"] == 1
    assert yaml.safe_load(text)["key"] == value or float(yaml.safe_load(text)["key"]) == value
    assert all(len(line) <= 80 for line in text.splitlines())


def test_numbers_are_read_as_a_run_reads_them(tmp_path: Path) -> None:
    keys = {"model_name_or_path": "m", "dataset_name": "r", "learning_rate": 1e-5, "use_cpu": True}
    path = tmp_path / "run.yaml"
    path.write_text(recipe([], [Section("a", keys, {})]))
    _, sft = parse_train(["--config", str(path)])
    assert isinstance(sft, LiftSFTConfig)
    assert sft.learning_rate == 1e-5
