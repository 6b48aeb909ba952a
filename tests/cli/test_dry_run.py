"""`leanlift train --dry_run`: all of a run but the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from snapshots import assert_screen
from tiny import make_checkpoint
from transformers import AutoModelForCausalLM

from leanlift import UserError
from leanlift.cli import main
from leanlift.cli.settings import parse_train
from leanlift.training.dry_run import dry_run
from leanlift.training.inputs import ready_rows
from leanlift.training.plan import plan_of, targets_of
from leanlift.training.room import disk_nbytes, steps_of
from leanlift.training.run import run
from leanlift.training.screens import QuietScreen


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("dry") / "Tiny-1B", tied=False)


@pytest.fixture
def argv(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # whoever loads it fails
    rows = [{"prompt": f"{i} + 1 = ", "completion": str(i + 1)} for i in range(20)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "train", "--model_name_or_path", str(base), "--dataset_name", "rows.jsonl",
        "--output_dir", "out", "--max_length", "64", "--approx_rank", "8", "--use_cpu", "true",
        "--dry_run",
    ]  # fmt: skip


VARIES = {r"of [\d.]+ [KMGT]iB free": "of ROOM free", r"--model_name_or_path \S+": "--model MODEL"}


def test_a_run_that_is_ready(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*argv, "--merged_dir", "merged"]) == 0
    assert_screen(capsys.readouterr().out, "dry-run", VARIES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"], "nothing is written"


def test_the_json_form_is_one_object_per_line(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*argv, "--log_format", "json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert events[-1]["event"] == "ready"
    assert "--dry_run" not in events[-1]["command"]


def without_a_matrix(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def fused(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    weight = tensors["model.layers.0.self_attn.q_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = weight[:32].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "said"),
    [(without_a_matrix, "has nothing in its place"), (fused, "q_proj.weight as (32, 64) in its")],
    ids=["missing", "another shape"],
)
def test_what_could_not_be_merged_is_found(
    damage: Any, said: str, argv: list[str], base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path("copy")
    shutil.copytree(base, copy)
    damage(copy)
    argv[argv.index(str(base))] = "./copy"
    assert main(argv) == 2
    assert said in capsys.readouterr().err


WRONG: dict[str, tuple[list[str], str]] = {
    "a key": (["--learning_rat", "1"], "did you mean --learning_rate?"),
    "a number": (["--density", "3"], "expected density as a number in (0, 1]"),
    "a column": (["--dataset_name", "other.jsonl"], "has the columns ['question']"),
    "a full place": (["--output_dir", "full"], "is not empty"),
    "a merge that is there": (["--merged_dir", "full"], "already exists"),
    "a target": (["--target_modules", "q_porj"], "matches nothing"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_would_end_a_run_ends_a_dry_one(
    wrong: str, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("full").mkdir()
    Path("full", "file").touch()
    Path("other.jsonl").write_text('{"question": "a"}\n')
    more, said = WRONG[wrong]
    assert main([*argv, *more]) == 2
    assert said in capsys.readouterr().err


def test_a_card_and_a_disk_that_are_too_small(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args, sft = parse_train([word for word in argv[1:] if word != "--dry_run"])
    plan, screen = plan_of(args, sft, cuda=True), QuietScreen()
    with pytest.raises(UserError, match=r"is planned to need .* and the card has .* --fit 0.5GB"):
        dry_run(args, sft, lambda batches: plan, screen, 2**29)
    usage = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr("leanlift.export.directory.shutil.disk_usage", lambda place: usage)
    assert main(argv) == 2
    assert "free at" in capsys.readouterr().err


@pytest.mark.thorough
def test_a_run_takes_no_more_of_the_disk_than_was_said(base: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.json"
    data.write_text(json.dumps([{"text": "abc"}] * 8))
    argv = ["--model_name_or_path", str(base), "--dataset_name", str(data), "--approx_rank", "4"]
    argv += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "true", "--max_steps", "6"]
    argv += ["--save_steps", "2", "--merged_dir", str(tmp_path / "merged"), "--density", "0.3"]
    args, sft = parse_train([*argv, "--refresh_interval", "2"])
    said = disk_nbytes(args, sft, plan_of(args, sft, cuda=False), steps_of(None, sft))
    run(args, sft)
    taken = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert 0.5 * said < taken <= said + 5 * 40_000, "headers come on top"


def test_the_targets_are_those_of_the_run(base: Path) -> None:
    args, sft = parse_train(["--model_name_or_path", str(base), "--dataset_name", "r"])
    targets = targets_of(args, sft)
    assert len(targets) == 14
    assert targets["model.layers.0.mlp.down_proj"] == (64, 192)


@pytest.mark.parametrize(
    ("rows", "settings", "steps"),
    [
        (10, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, 6),
        (5, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 1}, 4),
    ],
)
def test_steps_are_those_of_the_trainer(
    rows: int, settings: dict[str, Any], steps: int, base: Path, tmp_path: Path
) -> None:
    data = tmp_path / "rows.json"
    data.write_text(json.dumps([{"text": "abc"}] * rows))
    argv = ["--model_name_or_path", str(base), "--dataset_name", str(data), "--approx_rank", "4"]
    argv += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "true", "--save_strategy", "no"]
    argv += ["--num_train_epochs", "2"]
    argv += [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    args, sft = parse_train(argv)
    run(args, sft)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["max_steps"] == steps == steps_of(ready_rows(args, sft).data, sft)
