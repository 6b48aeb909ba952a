"""The wheels that a GPU machine may lack, without an index: what is asked for, and the limit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import wheelhouse
from benchmarks.gpu_proof import NEEDED

THERE = {"triton", "transformers", "peft", "accelerate", "rich", "jinja2", "yaml"}
"""What the machine has already."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What pip is asked for; each gives a wheel of a thousand bytes."""
    found: list[str] = []

    def run(command: list[str], check: bool) -> None:
        assert check
        assert "--no-deps" in command
        assert ":all:" in command  # binary only
        found.append(command[-1])
        directory = Path(command[command.index("--dest") + 1])
        (directory / f"{len(found)}.whl").write_bytes(bytes(1000))

    monkeypatch.setattr(subprocess, "run", run)
    return found


def made(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["wheelhouse", str(directory)])
    wheelhouse.main()


def test_all_that_the_proof_needs_is_fetched_or_there(
    tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    made(tmp_path / "wheels", monkeypatch)
    names = {package.partition(">")[0].replace("-", "_") for package in asked}
    assert {*NEEDED} - THERE <= names
    assert names.isdisjoint({"torch", "numpy", "pyarrow", *THERE})
    assert f"{len(asked) / 1000:7.1f} MB in all\n" in capsys.readouterr().out


def test_more_than_the_limit_is_said_and_an_error(
    tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(wheelhouse, "LIMIT", 5000)
    with pytest.raises(SystemExit, match="1"):
        made(tmp_path, monkeypatch)
    assert "MORE THAN 0" in capsys.readouterr().out
