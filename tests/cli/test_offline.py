"""No command asks anybody anything, with the hub within reach or without."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from tiny import make_checkpoint

from leanlift.cli import main

OFFLINE = """
import os, socket, sys
for name in ("HF_HUB_OFFLINE", "CI", "HF_HUB_DISABLE_TELEMETRY", "HF_UPDATE_DOWNLOAD_COUNTS"):
    os.environ.pop(name, None)
asked = []
def refuse(*args, **kwargs):
    asked.append(repr(args)[:200])
    raise OSError("no network here")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
socket.create_connection = refuse
import json, time
from leanlift.cli import main
commands = json.loads(sys.argv[1])
for argv in commands:
    code = main(argv)
    assert code == 0, (argv, code)
import leanlift.demo.run as short
short.STEPS = short.HELD_OUT_ROWS = 2
assert main(["demo", "--output_dir", sys.argv[2]]) == 0
time.sleep(0.5)
assert not asked, asked
print("asked nobody")
"""


@pytest.mark.thorough
def test_no_command_asks_anybody(tmp_path: Path) -> None:
    """With the hub within reach, so that whoever wants to send something would."""
    base = make_checkpoint(tmp_path / "base")
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(4)]))
    run = str(tmp_path / "run")
    model = ["--model_name_or_path", str(base)]
    commands = [
        ["train", *model, "--dataset_name", str(rows), "--output_dir", run, "--approx_rank", "4",
         "--max_steps", "1", "--max_length", "32", "--gradient_checkpointing", "false",
         "--eval_dataset_name", str(rows), "--merged_dir", str(tmp_path / "merged")],
        ["plan", *model, "--cpu", "--max_length", "32"],
        ["eval", "--adapter", run, "--data", str(rows), "--max_new_tokens", "2"],
        ["export", run, str(tmp_path / "out"), "--verify"],
        ["export", run, str(tmp_path / "peft"), "--format", "peft"],
        ["info", run],
        ["report", run],
        ["combine", run, run, "--average", "--output", str(tmp_path / "both")],
    ]  # fmt: skip
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache")}
    environment.pop("HF_HUB_OFFLINE")
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, json.dumps(commands), str(tmp_path / "demo")],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.endswith("asked nobody\n"), done.stderr[-2000:]


def test_a_run_a_merge_and_their_facts_ask_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unplanned: None
) -> None:
    """The same for what is done most, in this process."""
    asked: list[str] = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        asked.append(repr(args)[:200])
        raise OSError("no network here")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    rows, run = tmp_path / "rows.jsonl", str(tmp_path / "run")
    rows.write_text('{"prompt": "1 + 1 = ", "completion": "2"}\n' * 4)
    base = ["--model_name_or_path", str(make_checkpoint(tmp_path / "base"))]
    data = ["--dataset_name", str(rows), "--max_steps", "1", "--use_cpu", "true"]
    assert main(["train", *base, *data, "--output_dir", run]) == 0
    assert main(["export", run, str(tmp_path / "merged")]) == 0
    assert main(["info", run]) == main(["report", run]) == 0
    assert asked == []
    assert not constants.is_offline_mode(), "the libraries take the hub to be within reach"
    with pytest.raises(OSError, match="no network here"):
        socket.create_connection(("localhost", 9))
    assert len(asked) == 1, "whoever asks is seen"
