"""What stays in a run's directory, and that one run writes into it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from checkpoints import RESUMED, SAVING
from datasets import Dataset
from processes import ROOT
from runs import ROWS, settings, trainer_for
from tiny import load, make_tokenizer

from leanlift import LiftTrainer, UserError, get_lift_model
from leanlift.training.checkpointing.directory import clean, rotate
from leanlift.training.checkpointing.lock import OutputLock


def steps_in(output: Path) -> list[int]:
    return sorted(int(path.name.rpartition("-")[2]) for path in output.glob("checkpoint-*"))


def test_rotation_goes_by_step_and_not_by_time(tmp_path: Path) -> None:
    for age, step in enumerate((30, 20, 10, 4)):  # the older a step, the newer its files
        directory = tmp_path / f"checkpoint-{step}"
        directory.mkdir()
        os.utime(directory, (time.time() + 100 * age, time.time() + 100 * age))
    rotate(tmp_path, None, tmp_path / "checkpoint-30", None)
    rotate(tmp_path, 0, tmp_path / "checkpoint-30", None)
    assert steps_in(tmp_path) == [4, 10, 20, 30]
    rotate(tmp_path, 3, tmp_path / "checkpoint-30", str(tmp_path / "checkpoint-4"))
    assert steps_in(tmp_path) == [4, 20, 30]
    rotate(tmp_path, 1, tmp_path / "checkpoint-30", None)
    assert steps_in(tmp_path) == [30]


def test_what_was_just_written_outlives_checkpoints_of_a_later_step(tmp_path: Path) -> None:
    for step in (2, 4, 5, 6, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
    rotate(tmp_path, 2, tmp_path / "checkpoint-5", None)
    assert steps_in(tmp_path) == [4, 5]


def test_what_a_killed_run_has_left_is_cleaned(tmp_path: Path) -> None:
    (tmp_path / ".saving" / "checkpoint-8").mkdir(parents=True)
    (tmp_path / ".removed-checkpoint-2").mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".run.json.{dead.pid}.partial").write_text("{")
    alive = tmp_path / f".run.json.{os.getppid()}.partial"
    alive.write_text("{")
    (tmp_path / "checkpoint-4").mkdir()
    clean(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [alive.name, "checkpoint-4"]


@pytest.mark.thorough
def test_the_best_checkpoint_is_loaded_and_if_it_is_gone_the_last_adapter_is_saved(
    base: Path, tmp_path: Path
) -> None:
    def trainer(output: Path) -> LiftTrainer:
        return LiftTrainer(
            model=get_lift_model(load(base), RESUMED, progress=False),
            args=settings(
                output,
                **SAVING,
                save_total_limit=1,
                eval_strategy="steps",
                eval_steps=2,
                load_best_model_at_end=True,
                metric_for_best_model="loss",
                learning_rate=0.3,
            ),
            train_dataset=Dataset.from_list(ROWS),
            eval_dataset=Dataset.from_list(ROWS[:4]),
            processing_class=make_tokenizer(),
        )

    kept = trainer(tmp_path / "kept")
    kept.train()
    best = Path(str(kept.state.best_model_checkpoint))
    assert best.parent == tmp_path / "kept"
    assert steps_in(best.parent) == [int(best.name.rpartition("-")[2])]

    class Losing(LiftTrainer):
        def _load_best_model(self) -> None:
            shutil.rmtree(str(self.state.best_model_checkpoint))
            super()._load_best_model()

    lost = trainer(tmp_path / "lost")
    lost.__class__ = Losing
    with pytest.raises(UserError, match="the adapter of the last step is saved in"):
        lost.train()
    assert (tmp_path / "lost" / "adapter_model.safetensors").is_file()


# --- one run at a time ---------------------------------------------------------------------

HOLD = """
import sys
from leanlift.training.checkpointing.lock import OutputLock
with OutputLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.thorough
def test_two_runs_cannot_write_into_one_directory(base: Path, tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    trainer = trainer_for(base, tmp_path / "run", RESUMED, max_steps=1)
    with pytest.raises(UserError, match=f"another run, process {holder.pid} on .*, is writing"):
        trainer.train()
    holder.kill()  # it cannot take its lock away
    holder.communicate()
    assert (tmp_path / "run" / ".lock").exists()
    trainer.train()
    assert list((tmp_path / "run").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to"):
        trainer_for(base, tmp_path / "file" / "run", RESUMED).train()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_lock_is_gone_with_the_process_that_held_it(tmp_path: Path) -> None:
    (held, tell), (wait, end) = os.pipe(), os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the child leaves be
        child = os.fork()
    if child == 0:
        with OutputLock(tmp_path / "run"):
            os.write(tell, b"!")
            os.read(wait, 1)
    assert os.read(held, 1) == b"!"
    try:
        with (
            pytest.raises(UserError, match=f"another run, process {child} on .*, is writing"),
            OutputLock(tmp_path / "run"),
        ):
            pass
    finally:
        os.kill(child, signal.SIGKILL)  # it cannot take its lock away
        os.waitpid(child, 0)
        for pipe in (held, tell, wait, end):
            os.close(pipe)
    assert (tmp_path / "run" / ".lock").exists()
    with OutputLock(tmp_path / "run"):
        pass
