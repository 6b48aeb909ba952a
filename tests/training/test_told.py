"""What is said after a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from leanlift.training import RunArguments
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
