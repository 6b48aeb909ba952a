"""Ctrl-C and SIGTERM: the step is finished and saved, and the run goes on where it stopped."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from snapshots import assert_screen
from sweeps import swept

from leanlift.cli import main
from leanlift.cli import train as command
from leanlift.errors import Interrupted
from leanlift.training import LiftSFTConfig, RunArguments, run
from leanlift.training.checkpointing.lock import LOCK_NAME
from leanlift.training.interrupt import Interrupt
from leanlift.training.screens import QuietScreen, Step, Summary

STEPS = 8


@pytest.fixture(scope="module")
def rows(base: Path) -> Path:
    path = base.parent / "rows.jsonl"
    lines = [{"prompt": f"{i} + 1 = ", "completion": str(i + 1)} for i in range(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def settings(base: Path, rows: Path, out: Path, **more: Any) -> tuple[RunArguments, LiftSFTConfig]:
    args = RunArguments(
        str(base), str(rows), load_in_4bit=False, approx_rank=4, refresh_interval=3,
        eval_dataset_name=str(rows),
    )  # fmt: skip
    loop = {"save_strategy": "no", "logging_steps": 2, "learning_rate": 1e-2, **more}
    sft = LiftSFTConfig(
        output_dir=str(out), use_cpu=True, bf16=False, max_steps=STEPS,
        per_device_train_batch_size=4, **loop,
    )  # fmt: skip
    return args, sft


@pytest.fixture(scope="module")
def whole(base: Path, rows: Path) -> dict[str, torch.Tensor]:
    """The adapter of a run that nobody interrupts."""
    args, sft = settings(base, rows, base.parent / "whole", seed=7, eval_strategy="epoch")
    run(args, sft)
    return adapter(base.parent / "whole")


def adapter(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "adapter_model.safetensors")


class Impatient(QuietScreen):
    """Sends signals to this process where it is told to.

    Args:
        at: a step, or a phase.
        numbers: the signals.
    """

    def __init__(self, at: int | str, *numbers: signal.Signals) -> None:
        self.at, self.numbers = at, list(numbers)
        self.said: list[str] = []
        self.evaluated: list[int] = []
        self.stopped_with: tuple[Any, ...] | None = None
        self.ended: Summary | None = None

    def _send(self) -> None:
        for number in self.numbers:
            os.kill(os.getpid(), number)
        self.numbers = []

    def step(self, step: Step) -> None:
        if step.step == self.at:
            self._send()

    @contextmanager
    def phase(self, what: str) -> Iterator[None]:
        if what == self.at:
            self._send()
        yield

    def evaluation(self, evaluation: Any) -> None:
        self.evaluated.append(evaluation.step)

    def stopping(self, text: str) -> None:
        self.said.append(text)

    def stopped(self, *facts: Any) -> None:
        self.stopped_with = facts

    def summary(self, summary: Summary) -> None:
        self.ended = summary


@contextmanager
def handlers_are_put_back() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize(
    ("number", "at"),
    swept([(signal.SIGINT, 2), (signal.SIGINT, 3), (signal.SIGTERM, 6)], (signal.SIGINT, 3)),
    ids=lambda given: getattr(given, "name", f"step {given}"),
)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    base: Path, rows: Path, tmp_path: Path, whole: dict[str, torch.Tensor], number: Any, at: int
) -> None:
    """Steps 3 and 6 are refreshes and the ends of epochs, step 2 is a logged one."""
    out = tmp_path / "run"
    screen = Impatient(at, number)
    args, sft = settings(base, rows, out, seed=7, eval_strategy="epoch")
    with handlers_are_put_back(), pytest.raises(Interrupted) as stop:
        run(args, sft, screen=screen, command="leanlift train again")
    assert stop.value.exit_code == 128 + number
    assert f"stopped after step {at} of {STEPS}" in str(stop.value)
    assert str(stop.value).endswith("Go on with:\n  leanlift train again")
    checkpoint = str(out / f"checkpoint-{at}")
    assert screen.stopped_with == (at, STEPS, checkpoint, "leanlift train again")
    assert "once more quits at once" in screen.said[0]
    assert [step for step in screen.evaluated if step >= at] == []
    assert sorted(path.name for path in out.iterdir()) == [f"checkpoint-{at}"]

    args, sft = settings(base, rows, out, seed=7, eval_strategy="epoch")
    sft.resume_from_checkpoint = "true"
    again = Impatient(0)
    run(args, sft, screen=again)
    assert again.evaluated == [step for step in (3, 6, STEPS) if step > at]
    assert again.ended is not None
    assert again.ended.before is not None, "of the first part of the run"
    assert (again.ended.begun, again.ended.steps) == (at, STEPS)
    resumed = adapter(out)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_second_signal_quits_at_once(base: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    args, sft = settings(base, rows, out, save_strategy="steps", save_steps=2)
    screen = Impatient(3, signal.SIGINT, signal.SIGTERM)
    with handlers_are_put_back(), pytest.raises(Interrupted) as stop:
        run(args, sft, screen=screen)
    assert stop.value.exit_code == 143
    assert f"the last checkpoint is {out / 'checkpoint-2'}" in str(stop.value)
    assert [path.name for path in out.iterdir() if path.name != LOCK_NAME] == ["checkpoint-2"]
    sft.resume_from_checkpoint = "true"
    run(args, sft)  # the place is free


@pytest.mark.parametrize(
    ("phase", "kept"),
    [
        ("Reading the rows", "nothing is saved"),
        ("Loading the base", "nothing is saved"),
        ("Choosing the entries to train", "nothing is saved"),
        ("Preparing the training", "nothing is saved"),
        ("Saving the adapter", "before the adapter was saved"),
        ("Merging", "the adapter is saved in"),
    ],
)
def test_where_there_is_no_step_to_finish_a_run_quits_at_once(
    base: Path, rows: Path, tmp_path: Path, phase: str, kept: str
) -> None:
    out = tmp_path / "run"
    args, sft = settings(base, rows, out)
    args, sft.max_steps = replace(args, merged_dir=str(tmp_path / "merged")), 1
    with handlers_are_put_back(), pytest.raises(Interrupted, match=kept) as stop:
        run(args, sft, screen=Impatient(phase, signal.SIGINT))
    assert stop.value.exit_code == 130
    assert os.listdir(tmp_path) == (["run"] if phase == "Merging" else [])


def test_in_another_thread_signals_stay_what_they_were(
    base: Path, rows: Path, tmp_path: Path
) -> None:
    args, sft = settings(base, rows, tmp_path / "run")
    sft.max_steps = 1
    before = signal.getsignal(signal.SIGINT)
    seen: list[Any] = []

    class Looking(QuietScreen):
        def step(self, step: Step) -> None:
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run, args=(args, sft), kwargs={"screen": Looking()})
    thread.start()
    thread.join()
    assert set(seen) == {before}
    assert adapter(tmp_path / "run")


def test_a_worker_leaves_ctrl_c_to_its_parent_and_can_be_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A terminal gives Ctrl-C to every process of a run."""
    said: list[str] = []
    raised: list[int] = []
    interrupt = Interrupt(said.append)
    interrupt.stepping = True
    monkeypatch.setattr(interrupt, "_process", -1)
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    with handlers_are_put_back(), interrupt.heard():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert (said, raised, interrupt.asked) == ([], [], None)
        os.kill(os.getpid(), signal.SIGTERM)
        assert raised == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_last_step_is_the_end_of_a_run(base: Path, rows: Path, tmp_path: Path) -> None:
    args, sft = settings(base, rows, tmp_path / "run")
    run(args, sft, screen=Impatient(STEPS, signal.SIGINT))
    assert adapter(tmp_path / "run")
    args, sft = settings(base, rows, tmp_path / "again", eval_strategy="epoch")
    args, sft.max_steps = replace(args, merged_dir=str(tmp_path / "merged")), 1
    with pytest.raises(Interrupted, match="the adapter is saved in"):
        run(args, sft, screen=Impatient(1, signal.SIGTERM))
    assert adapter(tmp_path / "again")
    assert not (tmp_path / "merged").exists()


# --- on the command line ----------------------------------------------------------------------


def test_the_command_that_goes_on_is_printed(
    base: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    unplanned: None,
) -> None:
    monkeypatch.setattr(command, "screen_of", lambda name: Impatient(2, signal.SIGINT))
    out = tmp_path / "my run"
    argv = ["--model_name_or_path", str(base), "--dataset_name", str(rows), "--max_steps", "4"]
    argv += ["--load_in_4bit", "false", "--output_dir", str(out), "--use_cpu", "true"]
    assert main(["train", *argv]) == 130
    said = capsys.readouterr().err
    shown = {str(tmp_path): "TMP", str(base.parent): "BASE", r"(?s)train: .*\nleanlift": "leanlift"}
    assert_screen(said, "train-ctrl-c", shown)
    again = said.splitlines()[-1].replace(f"'{out}'", str(out).replace(" ", "\0")).split()
    assert again[:2] == ["leanlift", "train"]
    monkeypatch.setattr(command, "screen_of", lambda name: QuietScreen())
    assert main([word.replace("\0", " ") for word in again[1:]]) == 0


@pytest.mark.parametrize(
    "argv",
    [
        ["--seed", "1"],
        ["--resume_from_checkpoint", "run/checkpoint-3", "--seed", "1"],
        ["--resume_from_checkpoint=true", "--seed", "1"],
        ["--seed", "1", "--resume-from-checkpoint", "false"],
    ],
)
def test_going_on_takes_the_place_of_an_older_wish(argv: list[str]) -> None:
    expected = "leanlift train --seed 1 --resume_from_checkpoint true"
    assert command.resuming(argv) == expected


def test_a_library_that_makes_an_error_of_its_own_out_of_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled code that calls Python back may lose what is raised there."""
    module = import_module("leanlift.training.run")

    def losing(job: Any, plan: Any) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:
            raise ValueError("could not determine the shape") from None

    monkeypatch.setattr(module, "_run", losing)
    args = RunArguments("base", "rows.json")
    sft = LiftSFTConfig(str(tmp_path / "out"), use_cpu=True)
    with pytest.raises(Interrupted, match="before training began; nothing is saved") as stopped:
        module.run(args, sft)
    assert stopped.value.exit_code == 128 + signal.SIGTERM
