"""Going on with a run: under its settings, from a checkpoint that is whole, as far as it was to
go."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from processes import ROOT, run_python
from runs import ROWS, assert_same_layers, settings, trainer_for
from tiny import load, make_checkpoint, make_tokenizer
from transformers import EarlyStoppingCallback

from leanlift import LiftConfig, LiftTrainer, UserError, get_lift_model
from leanlift.model import lift_layers
from leanlift.training import RunArguments
from leanlift.training.checkpointing import checkpoint_to_resume, clean, put_in_place, rotate
from leanlift.training.settings import FREE, check_same_settings, data_facts, settings_of
from leanlift.training.whole import RANDOM, SCHEDULE, SEAL, check_checkpoint

LIFT = LiftConfig(approx_rank=8, refresh_interval=4)
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with checkpoints at 2, 4 and 6; not to be changed."""
    output = tmp_path_factory.mktemp("finished") / "run"
    trainer_for(base, output, LIFT, **SAVING).train()
    return output


def copied(finished: Path, to: Path, *steps: int) -> Path:
    to.mkdir(exist_ok=True)
    for step in steps:
        shutil.copytree(finished / f"checkpoint-{step}", to / f"checkpoint-{step}")
    return to


def resealed(checkpoint: Path) -> Path:
    """As if the damage had been written by leanlift itself."""
    kept = json.loads((checkpoint / SEAL).read_text())["settings"]
    staged = checkpoint.parent / ".saving" / checkpoint.name
    staged.parent.mkdir(exist_ok=True)
    checkpoint.rename(staged)
    return put_in_place(staged, kept)


# --- settings ------------------------------------------------------------------------------


def everything(tmp_path: Path) -> Any:
    args = RunArguments(model_name_or_path="base", dataset_name="rows.jsonl")
    return settings_of(
        settings(tmp_path), LIFT, dataclasses.asdict(args), {"data_rows": 4, "data_digest": "a"}
    )


def other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, (int, float)) else f"other than {value}"


def test_every_key_is_refused_by_name_or_said(tmp_path: Path) -> None:
    now = everything(tmp_path)
    assert check_same_settings(copy.deepcopy(now), now, "x") == []
    assert {"loop", "mask", "run", "data"} == set(now)
    for section, keys in now.items():
        for key, value in keys.items():
            saved = copy.deepcopy(now)
            saved[section][key] = other(value)
            if key in FREE or key == "num_train_epochs":  # max_steps counts, and is the same
                (sentence,) = check_same_settings(saved, now, "x")
                assert f"with {key}=" in sentence
                continue
            with pytest.raises(UserError, match=rf"made with {key}=.* asks for {key}="):
                check_same_settings(saved, now, "x")


def test_what_may_change_is_a_key_that_there_is(tmp_path: Path) -> None:
    known = {key for keys in everything(tmp_path).values() for key in keys}
    assert known | {"activation_checkpointing"} >= FREE  # transformers has it since 5.24


@pytest.mark.parametrize(
    ("schedule", "warmup", "free"),
    [
        ("constant", 0, True),
        ("constant_with_warmup", 5, True),
        ("constant_with_warmup", 0.1, False),
        ("linear", 0, False),
        ("cosine", 3, False),
    ],
)
def test_a_run_may_be_longer_where_its_schedule_does_not_ask(
    tmp_path: Path, schedule: str, warmup: float, free: bool
) -> None:
    now = everything(tmp_path)
    now["loop"] |= {"lr_scheduler_type": schedule, "warmup_steps": warmup}
    saved = copy.deepcopy(now)
    saved["loop"]["max_steps"] = 3
    if free:
        assert len(check_same_settings(saved, now, "x")) == 1
    else:
        with pytest.raises(UserError, match="max_steps=3"):
            check_same_settings(saved, now, "x")


@pytest.mark.parametrize(
    ("lift", "changes", "named"),
    [
        ({}, {"learning_rate": 1e-5}, "learning_rate=0.001, and this run .*learning_rate=1e-05"),
        ({}, {"per_device_train_batch_size": 2}, "per_device_train_batch_size=4"),
        ({"density": 0.1}, {}, "density=0.05"),
        ({"refresh_interval": 3}, {}, "refresh_interval=4"),
        ({"target_modules": ("q_proj",)}, {}, 'target_modules="all-linear"'),
        ({}, {"max_steps": 8}, "max_steps=6"),
        ({}, {"optim": "sparse_adamw"}, 'optim="adamw_torch"'),
    ],
)
def test_a_trainer_refuses_other_settings_before_it_changes_anything(
    base: Path,
    tmp_path: Path,
    finished: Path,
    lift: dict[str, Any],
    changes: dict[str, Any],
    named: str,
) -> None:
    output = copied(finished, tmp_path / "run", 2)
    config = dataclasses.replace(LIFT, **lift)
    trainer = trainer_for(base, output, config, **{**SAVING, **changes})
    before = [layer.index.to_flat() for layer in lift_layers(trainer.model).values()]
    with pytest.raises(UserError, match=named):
        trainer.train(resume_from_checkpoint=True)
    after = [layer.index.to_flat() for layer in lift_layers(trainer.model).values()]
    assert all(map(torch.equal, before, after))
    assert [path.name for path in output.iterdir()] == ["checkpoint-2"]


def test_other_data_are_refused_and_moved_ones_are_not(
    base: Path, tmp_path: Path, finished: Path
) -> None:
    output = copied(finished, tmp_path / "run", 4)

    def resume(rows: list[dict[str, str]]) -> LiftTrainer:
        trainer = LiftTrainer(
            model=get_lift_model(load(base), LIFT, progress=False),
            args=settings(output, **SAVING),
            train_dataset=Dataset.from_list(rows),
            processing_class=make_tokenizer(),
        )
        trainer.train(resume_from_checkpoint=True)
        return trainer

    with pytest.raises(UserError, match="data_rows=48 and data_digest="):
        resume(ROWS[:-1])
    changed = [*ROWS[:7], {**ROWS[7], "completion": "3"}, *ROWS[8:]]
    with pytest.raises(UserError, match="data_digest="):
        resume(changed)
    assert resume(list(ROWS)).state.global_step == 6


def test_a_digest_of_data_knows_content_alone() -> None:
    rows = [{"input_ids": [i] * (i % 9), "text": f"row {i}", "n": [[i]]} for i in range(1200)]
    whole = data_facts(Dataset.from_list(rows))
    pieces = Dataset.from_list([*rows[:7], rows[2], *rows[7:]])
    assert data_facts(pieces.select([*range(7), *range(8, 1201)])) == whole
    for other_rows in (
        rows[:-1],
        rows[::-1],
        [{**rows[0], "text": "x"}, *rows[1:]],
        [*rows[:9], {**rows[9], "input_ids": [1]}, *rows[10:]],
        [{**rows[0], "input_ids": [0]}, {**rows[1], "input_ids": []}, *rows[2:]],
    ):
        assert data_facts(Dataset.from_list(other_rows)) != whole
    assert data_facts(iter(rows)) == {}


def test_what_may_change_is_said_and_takes_effect(
    base: Path, tmp_path: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = copied(finished, tmp_path / "run", 4)
    trainer = trainer_for(base, output, LIFT, **{**SAVING, "save_steps": 5})
    with caplog.at_level("WARNING", "leanlift"):
        trainer.train(resume_from_checkpoint=True)
    assert "Going on with save_steps=5; it was 2." in caplog.messages
    assert (output / "checkpoint-5").is_dir()


# --- how far a run goes --------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_a_finished_run_takes_no_step(base: Path, tmp_path: Path, schedule: str) -> None:
    first = trainer_for(base, tmp_path, LIFT, lr_scheduler_type=schedule, **SAVING)
    first.train()
    again = trainer_for(base, tmp_path, LIFT, lr_scheduler_type=schedule, **SAVING)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    assert_same_layers(first.model, again.model)


@pytest.mark.parametrize("interval", [5, 3], ids=["no refresh", "a refresh"])
def test_a_longer_run_under_a_constant_schedule_equals_an_uninterrupted_one(
    base: Path, tmp_path: Path, interval: int
) -> None:
    """With and without a refresh due after what was the last step."""
    lift = dataclasses.replace(LIFT, refresh_interval=interval)
    options = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    whole = trainer_for(base, tmp_path / "whole", lift, **{**SAVING, "max_steps": 9, **options})
    whole.train()
    trainer_for(base, tmp_path / "run", lift, **SAVING, **options).train()
    longer = trainer_for(base, tmp_path / "run", lift, **{**SAVING, "max_steps": 9, **options})
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 9
    assert_same_layers(whole.model, longer.model)


def test_a_callback_that_the_checkpoint_does_not_know_is_no_error(
    base: Path, tmp_path: Path, finished: Path
) -> None:
    output = copied(finished, tmp_path / "run", 4)
    trainer = LiftTrainer(
        model=get_lift_model(load(base), LIFT, progress=False),
        args=settings(
            output, **SAVING, eval_strategy="steps", eval_steps=2, metric_for_best_model="loss"
        ),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS[:4]),
        processing_class=make_tokenizer(),
        callbacks=[EarlyStoppingCallback(3)],
    )
    trainer.train(resume_from_checkpoint=True)
    assert (output / "checkpoint-6").is_dir()


# --- damage --------------------------------------------------------------------------------


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "gone": lambda data: None,
    "empty": lambda data: b"",
    "cut off": lambda data: data[: len(data) // 2],
    "one bit": flipped,
    "longer": lambda data: data + b" ",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_file_can_be_damaged_unseen(tmp_path: Path, finished: Path, damage: str) -> None:
    output = copied(finished, tmp_path / "run", 2, 4)
    newest = output / "checkpoint-4"
    files = sorted(newest.iterdir())
    assert len(files) >= 9
    for file in files:
        data = file.read_bytes()
        changed = DAMAGES[damage](data)
        file.unlink() if changed is None else file.write_bytes(changed)
        if (damage, file.name) == ("longer", SEAL):
            assert check_checkpoint(newest).step == 4  # white space says nothing
        else:
            with pytest.raises(UserError, match="checkpoint-4") as caught:
                checkpoint_to_resume(output, str(newest))
            assert "\n" not in str(caught.value)
            assert checkpoint_to_resume(output, True).step == 2
        file.write_bytes(data)
    assert check_checkpoint(newest).step == 4


def test_an_older_checkpoint_takes_the_place_of_a_damaged_one_and_it_is_said(
    base: Path, tmp_path: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = copied(finished, tmp_path / "run", 2, 4)
    weights = output / "checkpoint-4" / "optimizer.safetensors"
    weights.write_bytes(flipped(weights.read_bytes()))
    trainer = trainer_for(base, output, LIFT, **SAVING)
    trainer.train(resume_from_checkpoint=True)
    assert any(
        "Passing over" in line and "optimizer.safetensors" in line for line in caplog.messages
    )
    for step in (4, 6):
        name = f"checkpoint-{step}/adapter_model.safetensors"
        assert (output / name).read_bytes() == (finished / name).read_bytes()


def edit(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(checkpoint: Path) -> None:
        data = json.loads((checkpoint / name).read_text())
        changed = change(data)
        (checkpoint / name).write_text(json.dumps(data if changed is None else changed))

    return apply


def state_with(**changes: Any) -> Callable[[Path], None]:
    return edit("trainer_state.json", lambda data: data.update(changes))


PLAUSIBLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "another step": (state_with(global_step=5), "not the state of step 4"),
    "no epoch": (state_with(epoch=None), "not the state of step 4"),
    "no batch size": (state_with(train_batch_size=None), "not the state"),
    "a log that is none": (state_with(log_history=[1]), "not the state"),
    "a key of tomorrow": (state_with(tomorrow=1), "another version of transformers"),
    "no mapping": (edit("trainer_state.json", lambda data: []), "is damaged"),
    "a schedule that is further": (
        edit(SCHEDULE, lambda data: data.update(last_epoch=5)),
        "it has gone 5 steps, and the run 4",
    ),
    "an infinite rate": (
        edit(SCHEDULE, lambda data: data.update(_last_lr=[float("inf")])),
        "a learning rate is not a number",
    ),
    "a NaN": (edit(SCHEDULE, lambda data: data.update(base_lrs=[float("nan")])), "is damaged"),
    "too few words": (edit(RANDOM, lambda data: data["python"][1].pop()), "no state of random"),
    "a place outside": (
        edit(RANDOM, lambda data: data["numpy"].__setitem__(2, 10**6)),
        "no state of random numbers",
    ),
    "half a torch": (edit(RANDOM, lambda data: data.update(cpu=data["cpu"][:100])), "no state of"),
    "an optimizer's list": (edit("optimizer.json", lambda data: [data]), "lacks groups or numbers"),
}


@pytest.mark.parametrize("what", PLAUSIBLE)
def test_a_whole_file_with_wrong_content_is_one_sentence(
    tmp_path: Path, finished: Path, what: str
) -> None:
    apply, match = PLAUSIBLE[what]
    newest = copied(finished, tmp_path / "run", 4) / "checkpoint-4"
    apply(newest)
    resealed(newest)
    with pytest.raises(UserError, match=match) as caught:
        checkpoint_to_resume(newest.parent, str(newest))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="holds no whole checkpoint to resume from"):
        checkpoint_to_resume(newest.parent, True)


def test_a_schedule_of_another_kind_or_rate_is_refused(
    base: Path, tmp_path: Path, finished: Path
) -> None:
    for name, change, match in (
        ("kind", lambda data: data.update(factor=2), "another kind of schedule"),
        ("rate", lambda data: data["base_lrs"].__setitem__(0, 0.5), "has a learning_rate of"),
    ):
        newest = copied(finished, tmp_path / name, 4) / "checkpoint-4"
        edit(SCHEDULE, change)(newest)
        resealed(newest)
        with pytest.raises(UserError, match=match):
            trainer_for(base, newest.parent, LIFT, **SAVING).train(resume_from_checkpoint=True)


def test_an_adapter_alone_is_no_checkpoint_to_go_on_from(base: Path, tmp_path: Path) -> None:
    trainer_for(base, tmp_path, LIFT, **SAVING, save_only_model=True).train()
    for wanted in (True, str(tmp_path / "checkpoint-4")):
        with pytest.raises(UserError, match="as save_only_model leaves it"):
            trainer_for(base, tmp_path, LIFT, **SAVING).train(resume_from_checkpoint=wanted)


def test_checkpoints_of_older_versions_are_read_and_it_is_said(
    base: Path, tmp_path: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from benchmarks.fuzz_checkpoint import as_older_versions_wrote, files_of

    newest = tmp_path / "run" / "checkpoint-4"
    newest.mkdir(parents=True)
    for name, data in as_older_versions_wrote(files_of(finished / "checkpoint-4")).items():
        (newest / name).write_bytes(data)
    with pytest.raises(UserError, match=r"density=0\.05"):
        config = dataclasses.replace(LIFT, density=0.1)
        trainer_for(base, newest.parent, config, **SAVING).train(resume_from_checkpoint=True)
    trainer = trainer_for(base, newest.parent, LIFT, **SAVING)
    trainer.train(resume_from_checkpoint=True)
    assert any("an older version wrote it" in line for line in caplog.messages)
    name = "checkpoint-6/adapter_model.safetensors"
    assert (newest.parent / name).read_bytes() == (finished / name).read_bytes()
    for name in ("scheduler.pt", "rng_state.pth"):
        data = (newest / name).read_bytes()
        for changed in (data[:-20], b"", b"cos\nsystem\n(S'echo'\ntR."):
            (newest / name).write_bytes(changed)
            with pytest.raises(UserError, match=name.replace(".", r"\.")):
                check_checkpoint(newest)
        (newest / name).write_bytes(data)


def test_random_damage_ends_in_the_same_bytes_or_in_a_sentence() -> None:
    result = run_python("-m", "benchmarks.fuzz_checkpoint", "--count", "18", "--no_csv")
    assert result.returncode == 0, result.stdout + result.stderr


# --- rotation, what is left behind ---------------------------------------------------------


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


def test_the_best_checkpoint_is_loaded_and_if_it_is_gone_the_last_adapter_is_saved(
    base: Path, tmp_path: Path
) -> None:
    def trainer(output: Path) -> LiftTrainer:
        return LiftTrainer(
            model=get_lift_model(load(base), LIFT, progress=False),
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
from leanlift.training.lock import OutputLock
with OutputLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


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
    trainer = trainer_for(base, tmp_path / "run", LIFT, max_steps=1)
    with pytest.raises(UserError, match=f"another run, process {holder.pid} on .*, is writing"):
        trainer.train()
    holder.kill()  # it cannot take its lock away
    holder.communicate()
    assert (tmp_path / "run" / ".lock").exists()
    trainer.train()
    assert list((tmp_path / "run").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to"):
        trainer_for(base, tmp_path / "file" / "run", LIFT).train()


def test_settings_that_would_be_ignored_are_refused(base: Path, tmp_path: Path) -> None:
    for changes, match in (
        ({"push_to_hub": True}, "leanlift push"),
        ({"torch_compile": True}, "torch_compile has no effect"),
    ):
        with pytest.raises(UserError, match=match):
            trainer_for(base, tmp_path, LIFT, **changes)
    bf16 = dataclasses.replace(LIFT, values_dtype="bfloat16")
    with pytest.raises(UserError, match="fp16 scales its loss"):
        trainer_for(base, tmp_path, bf16, fp16=True, optim="sparse_adamw")
    with pytest.raises(UserError, match="auto_find_batch_size"):
        trainer_for(
            base,
            tmp_path,
            LIFT,
            auto_find_batch_size=True,
            optim="sparse_adamw",
            optim_in_backward=True,
            max_grad_norm=0.0,
        )


def test_the_loss_of_a_step_with_a_refresh_is_logged(base: Path, tmp_path: Path) -> None:
    lift = dataclasses.replace(LIFT, refresh_interval=2)
    trainer = trainer_for(base, tmp_path, lift, max_steps=7, logging_steps=1)
    trainer.train()
    history = trainer.state.log_history
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4, 5, 6, 7]
    assert [entry["step"] for entry in history if "refresh_churn" in entry] == [2, 4, 6]
    assert all("mean_token_accuracy" in entry for entry in history if "loss" in entry)
    trainer = trainer_for(base, tmp_path, lift, max_steps=7, logging_steps=3)
    trainer.train()
    history = trainer.state.log_history
    assert [entry["step"] for entry in history if "loss" in entry] == [3, 6]
    assert [entry["step"] for entry in history if "refresh_churn" in entry] == [2, 4, 6]
