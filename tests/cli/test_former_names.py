"""Files, commands and adapters of former releases: their keys are taken under today's names."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from leanlift import LiftConfig, UserError
from leanlift.cli.early import check_early
from leanlift.cli.options import options
from leanlift.cli.parsing import read_flags
from leanlift.cli.settings import parse_train, read_command
from leanlift.settings import FORMER_NAMES

BASIC = ["--model_name_or_path", "base", "--dataset_name", "rows.json"]
VALUES = {"retired_limit": 0.5, "quantize_embeddings": True}


def in_file(place: Path, **settings: Any) -> list[str]:
    """The arguments that name a file of these settings, a new one each time."""
    file = place / f"{len(list(place.iterdir()))}.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return ["--config", str(file)]


FORMER_FILE = """\
# Planned to need 5.9 GiB of a card: Llama-3-8B, 1 × 2,048 tokens at a time.

# What was asked for
model_name_or_path: base
dataset_name: rows.json                 # your rows: .json, .jsonl or .parquet
settled_limit: 0.25
refresh_interval: 100

# Chosen to fit
quantize_ends: true                     # saves 517 MiB: less exact embeddings
"""
FORMER_COMMANDS = {
    "spaced": ["--settled_limit", "0.25", "--quantize_ends", "true"],
    "equals": ["--settled_limit=0.25", "--quantize_ends=yes"],
    "dashed": ["--settled-limit", "0.25", "--quantize-ends"],
}


def said(caplog: pytest.LogCaptureFixture, former: str) -> list[str]:
    return [line for line in caplog.messages if line.startswith(f"{former} is called ")]


@pytest.mark.parametrize("case", ["file", *FORMER_COMMANDS])
@pytest.mark.parametrize("command", ["train", "plan"])
def test_files_and_commands_of_former_releases_are_taken(
    command: str, case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run.yaml").write_text(FORMER_FILE, encoding="utf-8")
    argv = [*BASIC, *FORMER_COMMANDS[case]] if case != "file" else []
    argv = argv or ["--config", str(tmp_path / "run.yaml")]
    table = options()
    assert table is not None
    if case != "file":
        assert set(read_flags(command, argv, table)[0]) >= {"retired_limit", "quantize_embeddings"}
    with caplog.at_level(logging.WARNING, "leanlift"):
        config = read_command(command, argv).args.lift_config()
    assert (config.retired_limit, config.quantize_embeddings) == (0.25, True)
    for former, name in FORMER_NAMES.items():
        (line,) = said(caplog, former)
        assert name in line


def test_a_former_no_bound_is_none(tmp_path: Path) -> None:
    for argv in (["--settled_limit", "-1"], in_file(tmp_path, settled_limit=-1.0)):
        assert parse_train([*BASIC, *argv])[0].retired_limit is None
    assert LiftConfig.from_dict({"settled_limit": -1}).retired_limit is None


@pytest.mark.parametrize("former", FORMER_NAMES)
def test_a_setting_under_both_of_its_names_is_refused(former: str, tmp_path: Path) -> None:
    name = FORMER_NAMES[former]
    both = {name: VALUES[name], former: VALUES[name]}
    flags = [f"--{key}={each}" for key, each in both.items()]
    message = f"both {name} and {former}, which is its former name: keep {name}"
    with pytest.raises(UserError, match=message):
        LiftConfig.from_dict(both)
    for argv in (flags, flags[::-1], in_file(tmp_path, **both)):
        for look in (parse_train, lambda argv: check_early("plan", argv)):
            with pytest.raises(UserError, match=message):
                look([*BASIC, *argv])
    # A flag overrides a file, whatever it is called there.
    args = parse_train([*BASIC, *in_file(tmp_path, settled_limit=0.1), "--retired_limit", "0.2"])
    assert args[0].retired_limit == 0.2
