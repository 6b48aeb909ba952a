"""The examples as they are written, at a tiny size."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import ENVIRONMENT, ROOT, run_python
from tiny import load

from leanlift import load_adapter
from leanlift.cli import main
from leanlift.cli.settings import parse_train
from leanlift.methods import METHODS

EXAMPLES = ROOT / "examples"
PAIRS = [{"prompt": f"{i} plus {i} is ", "chosen": str(2 * i), "rejected": str(2 * i + 1)}
         for i in range(16)]  # fmt: skip
ROWS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]


def write_rows(place: Path, rows: list[dict[str, Any]]) -> Path:
    place.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return place


def test_every_recipe_is_one_that_the_command_takes() -> None:
    recipes = sorted(EXAMPLES.glob("*.yaml"))
    assert {"dpo.yaml", "qwen2.5_7b.yaml"} <= {path.name for path in recipes}
    for path in recipes:
        args, loop = parse_train(["--config", str(path)])
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert given.keys() >= {"model_name_or_path", "dataset_name", "output_dir"}
        assert all(hasattr(args, key) or hasattr(loop, key) for key in given)


@pytest.mark.usefixtures("unplanned")
def test_preferences_are_trained_as_the_recipe_says(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    argv = ["train", "--config", str(EXAMPLES / "dpo.yaml"), "--model_name_or_path", str(base),
            "--dataset_name", str(write_rows(tmp_path / "pairs.jsonl", PAIRS)),
            "--output_dir", str(run), "--max_steps", "2", "--logging_steps", "1"]  # fmt: skip
    assert main(argv) == 0
    assert "trained     2 steps" in capsys.readouterr().out
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-4)  # the reference is the base
    assert {"rewards/accuracies", "rewards/margins"} <= log[0].keys()
    assert (run / "adapter_model.safetensors").is_file()


# --- the script -----------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return runpy.run_path(str(EXAMPLES / "grpo_math.py"))


def test_a_completion_is_rewarded_by_its_number(script: dict[str, Any]) -> None:
    texts = {"so 3 + 4 = 7": 7, "#### 7 apples of 9": 7, "1,234.5": 1234.5, "it is -2.": -2,
             "7 #### none": None, "no": None, "#### 1 then #### 2": 2}  # fmt: skip
    assert {text: script["number_in"](text) for text in texts} == texts
    said = ["It is 7.", [{"role": "assistant", "content": "8"}], "none"]
    assert script["right"](said, ["#### 7", 7, "#### 7"], prompts=[]) == [1.0, 0.0, 0.0]


@pytest.mark.thorough
def test_the_script_of_rewards_runs(tmp_path: Path) -> None:
    done = run_python(str(EXAMPLES / "grpo_math.py"), "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert "Merged checkpoint" in done.stdout
    base, run = tmp_path / "run" / "tiny-base", tmp_path / "run"
    assert (run / "merged" / "model.safetensors").is_file()
    assert (run / "memory.json").is_file()
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "1 + 2 =", "answer": 3}] * 4)
    more = ["--base", str(base), "--rows", str(rows), "--steps", "1", "--out", str(tmp_path / "2")]
    again = run_python(str(EXAMPLES / "grpo_math.py"), *more)
    assert again.returncode == 0, again.stderr
    assert load_adapter(load(base), tmp_path / "2").active_adapter == "default"
    by_command = ["--method", "grpo", "--reward_funcs", "grpo_math:right", "--max_steps", "1",
                  "--model_name_or_path", str(base), "--dataset_name", str(rows),
                  "--output_dir", str(tmp_path / "3"), "--max_completion_length", "4"]  # fmt: skip
    third = run_python("-m", "leanlift", "train", *by_command, cwd=EXAMPLES)
    assert third.returncode == 0, third.stderr
    assert "trained     1 step" in third.stdout


# --- several processes ----------------------------------------------------------------------

BLOCKS = re.findall(r"```bash\n(.*?)```", (EXAMPLES / "ddp.md").read_text(encoding="utf-8"), re.S)
SLURM = {
    "scontrol": "echo localhost",
    "srun": """for SLURM_NODEID in 0 1; do
    export SLURM_NODEID
    "$@" & started="$started $!"
done
for each in $started; do wait "$each" || exit 1; done""",
}
"""What stands for Slurm: machines that are processes of one."""


def write_run(base: Path, place: Path) -> None:
    """A `run.yaml` for CPUs, and its rows."""
    write_rows(place / "rows.jsonl", ROWS)
    run = {"model_name_or_path": str(base), "dataset_name": "rows.jsonl", "output_dir": "run",
           "max_steps": 2, "save_steps": 1, "use_cpu": True, "bf16": False, "dtype": "float32",
           "approx_rank": 8}  # fmt: skip
    (place / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")


def test_each_launch_line_hands_over_what_the_command_takes(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(base, tmp_path)
    monkeypatch.chdir(tmp_path)
    handed = [line.split("-m leanlift train ")[1] for line in "".join(BLOCKS).splitlines()
              if "-m leanlift train " in line]  # fmt: skip
    assert len(BLOCKS) == len(handed) == 4
    for line in handed:
        words = shlex.split(line.rstrip("'").replace("$RESUME", "").replace("$RUN", "two"))
        args, _ = parse_train(words)
        assert args.method in METHODS
        assert args.dataset_name == "rows.jsonl"


@pytest.mark.thorough
@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_two_processes_are_started_as_it_is_written(base: Path, tmp_path: Path, block: int) -> None:
    write_run(base, tmp_path)
    (tmp_path / "bin").mkdir()
    for name, text in SLURM.items():
        place = tmp_path / "bin" / name
        place.write_text(f"#!/bin/bash\n{text}\n")
        place.chmod(0o755)
    path = os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent),
                            os.environ["PATH"]])  # fmt: skip
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "2",
             "SLURM_GPUS_PER_NODE": "1"}  # fmt: skip

    def start() -> str:
        done = subprocess.run(
            ["bash", "-c", BLOCKS[block]], cwd=tmp_path, env={**ENVIRONMENT, **slurm, "PATH": path},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    start()
    is_job = "srun" in BLOCKS[block]
    run = tmp_path / ("runs/two-machines" if is_job else "run")
    settings = json.loads((run / "checkpoint-2" / "checkpoint.json").read_text())["settings"]
    assert settings["run"]["processes"] == 2
    assert (run / "adapter_model.safetensors").is_file()
    if is_job:
        shutil.rmtree(run / "checkpoint-2")
        assert "Resuming from runs/two-machines/checkpoint-1" in start()


@pytest.mark.thorough
def test_ctrl_c_reaches_the_processes_through_their_launcher(base: Path, tmp_path: Path) -> None:
    write_run(base, tmp_path)
    text = (tmp_path / "run.yaml").read_text(encoding="utf-8")
    text = text.replace("max_steps: 2", "max_steps: 2000").replace("save_steps: 1", "save_steps: 4")
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with (tmp_path / "log").open("w+") as log:
        started = subprocess.Popen(
            shlex.split(BLOCKS[2]), cwd=tmp_path, env={**ENVIRONMENT, "PATH": path},
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        for _ in range(600):
            if (tmp_path / "run" / "checkpoint-4").is_dir() or started.poll() is not None:
                break
            time.sleep(0.1)
        os.killpg(started.pid, signal.SIGINT)  # as a terminal does
        assert started.wait(timeout=60) != 0
        log.seek(0)
        said = log.read()
    (step,) = set(
        re.findall(r"stopped after step (\d+) of 2,000; everything is saved in", said)
    )  # each says it
    assert int(step) >= 4
    assert (tmp_path / "run" / f"checkpoint-{step}" / "checkpoint.json").is_file()
