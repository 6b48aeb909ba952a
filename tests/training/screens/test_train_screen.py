"""`leanlift train` on a real terminal, into a pipe, and for a program; and its logs as before."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from events import EVENTS
from snapshots import assert_screen
from sweeps import swept
from terminal import Terminal
from tiny import load, make_tokenizer
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from leanlift import LiftTrainer, get_lift_model
from leanlift.cli import main
from leanlift.training import LiftSFTConfig, RunArguments, run


@pytest.fixture(scope="module")
def rows(base: Path) -> Path:
    path = base.parent / "rows.jsonl"
    lines = [{"prompt": f"{i} + 1 = ", "completion": str(i + 1)} for i in range(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def arguments(base: Path, rows: Path, out: Path, **more: Any) -> list[str]:
    given = {
        "model_name_or_path": base, "dataset_name": rows, "output_dir": out, "max_steps": 4,
        "approx_rank": 4, "refresh_interval": 2, "logging_steps": 1, "use_cpu": True,
        "per_device_train_batch_size": 4, "load_in_4bit": False, **more,
    }  # fmt: skip
    return ["train", *(word for key, value in given.items() for word in (f"--{key}", str(value)))]


# --- a terminal -------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
@pytest.mark.parametrize("stopped", [False, True], ids=["to the end", "Ctrl-C"])
def test_a_terminal_has_a_live_panel_and_is_put_back(
    base: Path, rows: Path, tmp_path: Path, stopped: bool
) -> None:
    more = {"max_steps": 100_000 if stopped else 4, "save_strategy": "no"}
    terminal = Terminal(*arguments(base, rows, tmp_path / "run", **more))
    terminal.read_until(rb"step [2-9][0-9]* of")
    if stopped:
        terminal.type(b"\x03")
    code = terminal.end()
    text = terminal.shown.decode()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "")
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") >= 0, "the cursor stays hidden"
    assert "╭─ step" in plain
    assert "speed " in plain
    assert re.search(r"step +\d+/\d+   loss \d", plain)
    assert "it/s" not in plain
    if stopped:
        assert code == 130
        assert plain.rstrip().endswith("--resume_from_checkpoint true")
        assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1
    else:
        assert code == 0
        assert plain.rstrip().endswith(f"leanlift export {tmp_path / 'run'} MERGED")


# --- a pipe -----------------------------------------------------------------------------------

VARIES = {
    r" +lr (\S+) +\d.*": r"   lr \1   SPEED",
    r"\d[\d.]* [KMG]iB( RAM)?": r"SIZE\1",
    r"in [\d.]+ s, [\d,.]+( k)? tokens/s": "in TIME, SPEED",
    r"in [\d.]+ s,": "in TIME,",
    r"(loss|evaluation)( +|: loss |.*loss )\d[\d.]*( → \d[\d.]*)?(, [\d.]+ s)?": r"\1\2LOSS",
    r"[\d.]+ % of the trained": "SHARE of the trained",
    r"\d+ retired": "COUNT retired",
}
"""What another processor computes otherwise: times, memory, and digits of losses."""


@pytest.mark.thorough
def test_a_whole_run_in_a_pipe(
    base: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"eval_dataset_name": rows, "merged_dir": tmp_path / "merged"}
    assert main(arguments(base, rows, tmp_path / "run", **more)) == 0
    out, err = capsys.readouterr()
    paths = {str(tmp_path): "TMP", str(base.parent): "BASE"}
    assert_screen(out, "train-run", {**paths, **VARIES})
    assert err == ""


# --- a program --------------------------------------------------------------------------------


@pytest.mark.thorough
def test_every_line_of_the_json_form_is_an_object(
    base: Path, rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    more = {"eval_dataset_name": rows, "log_format": "json", "logging_steps": 2}
    assert main(arguments(base, rows, tmp_path / "run", **more)) == 0
    out, err = capfd.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    assert err == ""
    assert all(set(e) == {"event", "seconds", *EVENTS[e["event"]]} for e in found)
    kinds = [event["event"] for event in found if event["event"] not in ("phase", "progress")]
    assert kinds == [
        "first_row", "header", "evaluation", "refresh", "step", "evaluation",
        "step", "evaluation", "summary",
    ]  # fmt: skip
    assert [e["step"] for e in found if e["event"] == "step"] == [2, 4]
    summary = found[-1]
    assert summary["before"] == next(e for e in found if e["event"] == "evaluation")["loss"]
    assert summary["places"][0]["path"] == str(tmp_path / "run")


# --- as before --------------------------------------------------------------------------------


class Reporter(TrainerCallback):
    """What TensorBoard and W&B hang on."""

    logged: list[tuple[int, dict[str, Any]]]

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        type(self).logged.append((state.global_step, dict(logs)))


def test_reports_elsewhere_are_those_of_a_trainer(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "elsewhere", Reporter)

    def settings(out: Path) -> LiftSFTConfig:
        return LiftSFTConfig(
            output_dir=str(out), use_cpu=True, bf16=False, max_steps=4, logging_steps=1,
            per_device_train_batch_size=4, report_to=["elsewhere"], save_strategy="no",
        )  # fmt: skip

    Reporter.logged = []
    args = RunArguments(str(base), str(rows), load_in_4bit=False, approx_rank=4, refresh_interval=2)
    run(args, settings(tmp_path / "run"))
    ours, Reporter.logged = Reporter.logged, []
    model = get_lift_model(load(base, "dense"), args.lift_config(), progress=False)
    data = [json.loads(line) for line in rows.read_text().splitlines()]
    LiftTrainer(model, settings(tmp_path / "trainer"), data, None, make_tokenizer()).train()
    theirs = Reporter.logged
    assert [(step, set(logs)) for step, logs in ours] == [(s, set(logs)) for s, logs in theirs]
    kept = ("loss", "grad_norm", "learning_rate", "num_tokens", "refresh_churn")
    for (_, mine), (_, other) in zip(ours, theirs, strict=True):
        assert {key: mine.get(key) for key in kept} == {key: other.get(key) for key in kept}


@pytest.mark.parametrize("strategy", swept(["no", "steps", "epoch"], "steps"))
@pytest.mark.parametrize("steps", [3, 4], ids=["the end of an epoch", "amid one"])
def test_rows_to_evaluate_on_are_evaluated_before_and_after(
    base: Path, rows: Path, tmp_path: Path, strategy: str, steps: int
) -> None:
    args = RunArguments(
        str(base), str(rows), load_in_4bit=False, approx_rank=4, eval_dataset_name=str(rows)
    )
    sft = LiftSFTConfig(
        output_dir=str(tmp_path / "run"), use_cpu=True, bf16=False, max_steps=steps, eval_steps=3,
        per_device_train_batch_size=4, eval_strategy=strategy, save_strategy="no",
    )  # fmt: skip
    run(args, sft)
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    evaluated = [logs["step"] for logs in history if "eval_loss" in logs]
    between = [] if strategy == "no" or steps == 3 else [3]
    assert evaluated == [0, *between, steps]
    assert not sft.eval_on_start, "the caller's settings stay as they are"


def test_nothing_is_evaluated_without_rows(base: Path, rows: Path, tmp_path: Path) -> None:
    args = RunArguments(str(base), str(rows), load_in_4bit=False, approx_rank=4)
    sft = LiftSFTConfig(output_dir=str(tmp_path / "run"), use_cpu=True, bf16=False, max_steps=1)
    run(args, sft)
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert not any("eval_loss" in logs for logs in history)
