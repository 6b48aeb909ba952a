"""What is said after a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from leanlift.training import RunArguments
from leanlift.training.settings import check_same_settings
from leanlift.training.told import next_commands


@pytest.mark.parametrize(
    ("split", "limit"),
    [("test[:6]", " --limit 6"), ("test", ""), ("test[2:6]", ""), ("test[:10%]", "")],
)
def test_the_command_that_evaluates_asks_for_the_same_rows(split: str, limit: str) -> None:
    args = RunArguments("base", "a.json", eval_dataset_name="t.json", eval_dataset_split=split)
    report, evaluate, export = next_commands(args, Path("out"))
    assert report == "leanlift report out"
    assert evaluate == f"leanlift eval --adapter out --data t.json{limit}"
    assert export == "leanlift export out MERGED"
    first = RunArguments("base", "a.json", "train[:40]")
    assert next_commands(first, Path("out"))[1].endswith("--data a.json --limit 40")


def test_what_a_run_sets_by_itself_is_no_change_of_the_users() -> None:
    saved = {"loop": {"eval_on_start": True, "logging_steps": 1}}
    now = {"loop": {"eval_on_start": False, "logging_steps": 2}}
    said = check_same_settings(saved, now, "checkpoint-3")
    assert said == ["Going on with logging_steps=2; it was 1."]
