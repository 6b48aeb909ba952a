"""A checkpoint that is damaged, or whole and wrong: passed over or refused, never taken."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import RESUMED, SAVING, copied, resealed
from processes import run_python
from runs import trainer_for

from leanlift import UserError
from leanlift.training.checkpointing.directory import checkpoint_to_resume
from leanlift.training.checkpointing.whole import RANDOM, SCHEDULE, SEAL, check_checkpoint


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
    trainer = trainer_for(base, output, RESUMED, **SAVING)
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
            trainer_for(base, newest.parent, RESUMED, **SAVING).train(resume_from_checkpoint=True)


def test_an_adapter_alone_is_no_checkpoint_to_go_on_from(base: Path, tmp_path: Path) -> None:
    trainer_for(base, tmp_path, RESUMED, **SAVING, save_only_model=True).train()
    for wanted in (True, str(tmp_path / "checkpoint-4")):
        with pytest.raises(UserError, match="as save_only_model leaves it"):
            trainer_for(base, tmp_path, RESUMED, **SAVING).train(resume_from_checkpoint=wanted)


def test_checkpoints_of_older_versions_are_read_and_it_is_said(
    base: Path, tmp_path: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from benchmarks.fuzz_checkpoint import as_older_versions_wrote, files_of

    newest = tmp_path / "run" / "checkpoint-4"
    newest.mkdir(parents=True)
    for name, data in as_older_versions_wrote(files_of(finished / "checkpoint-4")).items():
        (newest / name).write_bytes(data)
    with pytest.raises(UserError, match=r"density=0\.05"):
        config = dataclasses.replace(RESUMED, density=0.1)
        trainer_for(base, newest.parent, config, **SAVING).train(resume_from_checkpoint=True)
    trainer = trainer_for(base, newest.parent, RESUMED, **SAVING)
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


@pytest.mark.thorough
def test_random_damage_ends_in_the_same_bytes_or_in_a_sentence() -> None:
    result = run_python("-m", "benchmarks.fuzz_checkpoint", "--count", "18", "--no_csv")
    assert result.returncode == 0, result.stdout + result.stderr
