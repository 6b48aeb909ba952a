"""Going on with a run: under its settings, from a checkpoint that is whole, as far as it was to
go."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import RESUMED, SAVING, copied
from datasets import Dataset
from runs import ROWS, assert_same_layers, settings, trainer_for
from sweeps import swept
from tiny import load, make_tokenizer
from transformers import EarlyStoppingCallback

from leanlift import LiftConfig, LiftSFTConfig, LiftTrainer, UserError, get_lift_model
from leanlift.model import lift_layers
from leanlift.training import RunArguments
from leanlift.training.checkpointing.settings import (
    FREE,
    check_same_settings,
    data_facts,
    settings_of,
)

# --- settings ------------------------------------------------------------------------------


def everything(tmp_path: Path) -> Any:
    args = RunArguments(model_name_or_path="base", dataset_name="rows.jsonl")
    return settings_of(
        settings(tmp_path), RESUMED, dataclasses.asdict(args), {"data_rows": 4, "data_digest": "a"}
    )


def other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, (int, float)) else f"other than {value}"


def test_every_key_is_refused_by_name_or_said(tmp_path: Path) -> None:
    now = everything(tmp_path)
    assert check_same_settings(copy.deepcopy(now), now, "x") == []
    assert {"loop", "mask", "run", "data"} == set(now)
    assert "eval_on_start" not in now["loop"]  # a run sets it, and another one when it goes on
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
    config = dataclasses.replace(RESUMED, **lift)
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
            model=get_lift_model(load(base), RESUMED, progress=False),
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
    trainer = trainer_for(base, output, RESUMED, **{**SAVING, "save_steps": 5})
    with caplog.at_level("WARNING", "leanlift"):
        trainer.train(resume_from_checkpoint=True)
    assert "Going on with save_steps=5; it was 2." in caplog.messages
    assert (output / "checkpoint-5").is_dir()


# --- how far a run goes --------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_a_finished_run_takes_no_step(base: Path, tmp_path: Path, schedule: str) -> None:
    first = trainer_for(base, tmp_path, RESUMED, lr_scheduler_type=schedule, **SAVING)
    first.train()
    again = trainer_for(base, tmp_path, RESUMED, lr_scheduler_type=schedule, **SAVING)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    assert_same_layers(first.model, again.model)


@pytest.mark.parametrize("interval", swept([5, 3], 3), ids=["no refresh", "a refresh"])
def test_a_longer_run_under_a_constant_schedule_equals_an_uninterrupted_one(
    base: Path, tmp_path: Path, interval: int
) -> None:
    """With and without a refresh due after what was the last step."""
    lift = dataclasses.replace(RESUMED, refresh_interval=interval)
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
        model=get_lift_model(load(base), RESUMED, progress=False),
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


def test_settings_that_would_be_ignored_are_refused(base: Path, tmp_path: Path) -> None:
    for changes, match in (
        ({"push_to_hub": True}, "leanlift push"),
        ({"torch_compile": True}, "torch_compile has no effect"),
    ):
        with pytest.raises(UserError, match=match):
            trainer_for(base, tmp_path, RESUMED, **changes)
    bf16 = dataclasses.replace(RESUMED, values_dtype="bfloat16")
    with pytest.raises(UserError, match="fp16 scales its loss"):
        trainer_for(base, tmp_path, bf16, fp16=True, optim="sparse_adamw")
    with pytest.raises(UserError, match="auto_find_batch_size"):
        trainer_for(
            base,
            tmp_path,
            RESUMED,
            auto_find_batch_size=True,
            optim="sparse_adamw",
            optim_in_backward=True,
            max_grad_norm=0.0,
        )


def test_the_loss_of_a_step_with_a_refresh_is_logged(base: Path, tmp_path: Path) -> None:
    lift = dataclasses.replace(RESUMED, refresh_interval=2)
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


def test_settings_of_a_checkpoint_under_former_names_are_compared() -> None:
    """What an older release has sealed: another value is a change all the same."""
    config = LiftConfig(quantize_embeddings=True, retired_limit=0.25)
    now = settings_of(LiftSFTConfig("run", use_cpu=True), config)
    saved = json.loads(json.dumps(now))
    mask = saved["mask"]
    mask["quantize_ends"] = mask.pop("quantize_embeddings")
    mask["settled_limit"] = mask.pop("retired_limit")
    assert check_same_settings(saved, now, "checkpoint-1") == []
    for former, value in (("quantize_ends", False), ("settled_limit", 0.5)):
        changed = {**saved, "mask": {**mask, former: value}}
        with pytest.raises(UserError, match="was made with"):
            check_same_settings(changed, now, "checkpoint-1")
