"""The rows of a run, as the command line and a file of settings name them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from chats import ANSWER, USER, write
from command import complaint
from tiny import make_checkpoint
from tokenizers_of_all_kinds import CHATML, characters

from leanlift.cli import main
from leanlift.evaluation.verify import _first_rows
from leanlift.export.card import _data
from leanlift.training import LiftSFTConfig, RunArguments
from leanlift.training.told import next_commands, settings_for_reader

CHATS = [{"messages": [USER, {**ANSWER, "content": f"chat {n}"}], "id": n} for n in range(16)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint(tmp_path_factory.mktemp("rows") / "base", tied=False)
    characters(CHATML).save_pretrained(path)
    return path


@pytest.fixture
def argv(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unplanned: None) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "rows_of_mine", raising=False)
    write(Path("a.jsonl"), CHATS)
    Path("b.csv").write_text("instruction,output\n" + "ask,cell 007\n" * 8)
    Path("rows_of_mine.py").write_text("def as_text(row):\n    return 'id ' + str(row['id'])\n")
    return [
        "train", "--model_name_or_path", str(base), "--output_dir", "out", "--max_length", "64",
        "--approx_rank", "8", "--use_cpu", "true", "--load_in_4bit", "false",
    ]  # fmt: skip


SEEN: dict[str, tuple[list[str], list[str]]] = {
    "cells": (["--dataset_name", "b.csv"], ["[user]ask</s>↵[assistant]⟦cell 007</s>↵⟧"]),
    "a stream": (
        ["--dataset_name", "a.jsonl", "--streaming", "--max_steps", "2"],
        ["[user]q</s>↵[assistant]⟦chat 0</s>↵⟧", "2 steps"],
    ),
    "a function": (
        ["--dataset_name", "a.jsonl", "--formatting_func", "rows_of_mine:as_text"],
        ["i⟦d 0</s>⟧", "16 examples are trained"],
    ),
    "two files": (
        ["--datasets", "b.csv", "a.jsonl"],
        ["⟦cell 007</s>↵⟧", "24 examples are trained", "a.jsonl: columns not used: id"],
    ),
    "shares": (
        ["--datasets", '{"path": "b.csv", "fraction": 2}', '{"path": "a.jsonl", "fraction": 1}'],
        ["12 examples are trained"],
    ),
    "a file of settings": (["--config", "run.yaml"], ["12 examples are trained"]),
}
"""Flags, and what a dry run says."""


@pytest.mark.parametrize("form", SEEN)
def test_a_dry_run_shows_the_first_row_and_counts(
    form: str, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags, said = SEEN[form]
    Path("run.yaml").write_text(
        "datasets:\n- path: b.csv\n  fraction: 2\n- path: a.jsonl\n  fraction: 1\n"
    )
    assert main([*argv, "--dry_run", *flags]) == 0
    shown = capsys.readouterr().out
    joined = "".join(line.strip() for line in shown.splitlines())
    for words in said:
        assert words in shown or words in joined


WRONG: dict[str, tuple[list[str], str]] = {
    "no rows": ([], "leanlift train needs rows"),
    "both": (["--dataset_name", "a.jsonl", "--datasets", "b.csv"], "give one of them"),
    "a stream without an end": (["--dataset_name", "a.jsonl", "--streaming"], "say max_steps"),
    "a short stream": (
        ["--dataset_name", "b.csv", "--streaming", "--max_steps", "2",
         "--gradient_accumulation_steps", "9"],
        "a stream of 8 examples, and a step takes 9",
    ),
    "a part that is not there": (["--datasets", "a.jsonl", "c.csv"], "c.csv does not exist"),
    "a part of another shape": (["--datasets", "a.jsonl", "o.jsonl"], "columns ['question']"),
    "a weight": (["--datasets", '{"path": "b.csv", "weight": 1}'], "did you mean fraction?"),
    "half a mapping": (["--datasets", '{"path": '], "expected files or hub names, or mappings"),
    "no function": (["--dataset_name", "a.jsonl", "--formatting_func", "as_text"], "expected"),
    "a function that fails": (
        ["--dataset_name", "b.csv", "--formatting_func", "rows_of_mine:as_text"],
        "fails on row 0 of the train dataset with KeyError",
    ),
    "a module that is not there": (
        ["--dataset_name", "a.jsonl", "--formatting_func", "row_of_mine:as_text"],
        "there is no module row_of_mine",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_rows_that_cannot_be_had(
    wrong: str, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write(Path("o.jsonl"), [{"question": "a"}])
    flags, said = WRONG[wrong]
    assert said in complaint(capsys, *argv, *flags)
    assert not Path("out").exists()


def test_a_mixed_stream_is_trained_on_and_what_is_left_says_so(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    places = ['{"path": "a.jsonl", "fraction": 1}', '{"path": "b.csv", "fraction": 1}']
    flags = ["--streaming", "--max_steps", "2", "--gradient_accumulation_steps", "1"]
    assert main([*argv, "--datasets", *places, *flags]) == 0
    run = json.loads(Path("out/run.json").read_text())
    assert [part["path"] for part in run["datasets"]] == [
        str(Path(name).absolute()) for name in ("a.jsonl", "b.csv")
    ]
    assert run["dataset_name"] == ""
    assert "leanlift eval --adapter out --data a.jsonl" in capsys.readouterr().out
    assert main(["export", "out", "merged", "--verify"]) == 0
    assert "a.jsonl, b.csv" in Path("merged/README.md").read_text()


def test_rows_of_a_function_are_evaluated_by_it(
    argv: list[str], base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(Path("odd.jsonl"), [{"id": 5}, {"id": 6}])
    command = ["eval", "--model_name_or_path", str(base), "--data", "odd.jsonl", "--json"]
    function = ["--formatting_func", "rows_of_mine:as_text", "--max_new_tokens", "0"]
    assert main([*command, *function]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["tokens"]) == (2, 8)
    args = RunArguments("base", "odd.jsonl", formatting_func="rows_of_mine:as_text")
    evaluate = next_commands(args, Path("out"))[1]
    assert evaluate.endswith("--data odd.jsonl --formatting_func rows_of_mine:as_text")


@pytest.mark.parametrize(
    ("facts", "first", "said"),
    [
        ({"dataset_name": "/x/a.json", "datasets": []}, ("/x/a.json", "train"), "a.json"),
        ({"datasets": [{"path": "org/a", "split": "test"}]}, ("org/a", "test"), "org/a"),
        ({"dataset_name": "", "datasets": [{"path": "b.csv"}]}, ("b.csv", "train"), "b.csv"),
        ({"dataset_name": "", "datasets": "?"}, ("", "train"), None),
        ({"datasets": [5]}, (None, "train"), None),
        ({}, (None, "train"), None),
    ],
)
def test_what_is_read_of_a_run_that_anyone_may_have_written(
    facts: dict[str, Any], first: tuple[Any, Any], said: str | None
) -> None:
    assert _first_rows(facts) == first
    assert _data(facts).get("data") == said


def test_places_are_kept_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("a.json").touch()
    args = RunArguments("base", datasets=[{"path": "~/a.json"}, "org/rows"])
    assert [part.path for part in args.parts()] == [f"{tmp_path}/a.json", "org/rows"]
    kept = settings_for_reader(args, LiftSFTConfig(use_cpu=True))
    assert [part["path"] for part in kept["datasets"]] == [f"{tmp_path}/a.json", "org/rows"]
