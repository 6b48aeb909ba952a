"""What settings may be, wherever they come from; what is refused before anything is loaded."""

from __future__ import annotations

import dataclasses
import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers.integrations import integration_utils

from leanlift import LiftConfig, UserError
from leanlift.cli import in_a_sentence, main
from leanlift.cli.settings import parse_train, read_command
from leanlift.settings import NUMBERS
from leanlift.training import LiftSFTConfig, RunArguments
from leanlift.training.checks import check_settings

BASIC = {"model_name_or_path": "base", "dataset_name": "rows.json", "output_dir": "out"}
NEVER = (float("nan"), float("inf"), "many", True)
OUT_OF_RANGE: dict[str, Any] = {
    "max_steps": (-5, 0, 1.5),
    "per_device_train_batch_size": (0, -1, 2.5),
    "gradient_accumulation_steps": (0,),
    "num_train_epochs": (0, -1),
    "label_smoothing_factor": (1.0, -0.1),
    "adam_beta2": (1.0,),
}


def written(path: Path, **settings: Any) -> str:
    path.write_text(yaml.safe_dump({**BASIC, **settings}))
    return str(path)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_held_against_what_they_count(name: str, tmp_path: Path) -> None:
    for value in (*NEVER, *OUT_OF_RANGE.get(name, (-7,))):
        if name == "pad_to_multiple_of" and isinstance(value, str):
            continue  # "auto" is one
        with pytest.raises(UserError, match=name):
            LiftSFTConfig(**{**BASIC_LOOP, name: value})
        with pytest.raises(UserError, match=name):
            parse_train(["--config", written(tmp_path / "a.yaml", **{name: value})])


BASIC_LOOP = {"output_dir": "out", "use_cpu": True}


def test_every_number_of_the_table_is_a_field_that_may_have_its_default() -> None:
    fields = {field.name for field in dataclasses.fields(LiftSFTConfig)}
    assert set(NUMBERS) <= fields
    LiftSFTConfig(**BASIC_LOOP)


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--learning_rat", "1e-4"],
        ["train", "--max_step", "5"],
        ["train", "--dens=0.1"],
        ["eval", "--dat", "rows.json"],
        ["export", "a", "b", "--dtyp", "float16"],
        ["combine", "a", "--outpu", "x"],
        ["info", "a", "--jso"],
    ],
    ids=lambda argv: " ".join(argv[:1]),
)
def test_no_option_is_guessed(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: Any = main(argv)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_wrong_flag_names_the_right_one() -> None:
    with pytest.raises(
        UserError, match=r"--learning_rat is no option.*did you mean --learning_rate"
    ):
        parse_train(["--learning_rat", "1e-4", "--model_name_or_path", "x"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nseed: 2\n", "'seed' stands on lines 1 and 2"),
        ("density_pattern: {a: 0.1, a: 0.2}\n", "'a' stands on lines 1 and 1"),
        ("learning_rate: [1, 2]\n", "learning_rate cannot be"),
        ("max_steps: {a: 1}\n", "max_steps cannot be"),
        ("max_steps: true\n", "max_steps cannot be True"),
        ("load_in_4bit: perhaps\n", "load_in_4bit cannot be 'perhaps'"),
        ("load_in_4bit: 7\n", "load_in_4bit cannot be 7"),
        ("eval_strategy: sometimes\n", "sometimes"),
        ("help: true\n", "unknown key 'help'"),
        ("7: true\n", "unknown key 7"),
        ("!!python/object:os.system {}\n", "not valid YAML"),
        ("{[1]: 2}\n", "not valid YAML"),
        ("load_in_4bit: true\nload_in_8bit: true\n", "exclude each other"),
    ],
)
def test_mistakes_in_the_file(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    flags = [f"--{key}={value}" for key, value in BASIC.items()]
    with pytest.raises(UserError) as refused:
        parse_train(["--config", str(tmp_path / "run.yaml"), *flags])
    assert said in str(refused.value)


def test_values_of_the_file_are_what_flags_would_give(tmp_path: Path) -> None:
    args, sft = parse_train(
        [
            "--config",
            written(
                tmp_path / "run.yaml", learning_rate="2e-4", target_modules="q_proj",
                max_length=None, block=1, report_to=["none"], load_in_4bit=False,
                lr_scheduler_kwargs={"num_cycles": 2}, rank_budget="8",
            ),
        ]
    )  # fmt: skip
    assert (sft.learning_rate, args.target_modules, sft.max_length) == (2e-4, ("q_proj",), None)
    assert (args.block, args.rank_budget, args.load_in_4bit) == (1, 8, False)
    assert sft.lr_scheduler_kwargs == {"num_cycles": 2}


def test_a_file_of_arguments_beside_the_program_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leanlift.args").write_text("--seed 7")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "leanlift")])
    assert parse_train(["--config", written(tmp_path / "a.yaml")])[1].seed == 42


ON_A_GPU: dict[str, tuple[list[str], dict[str, Any], bool]] = {
    "nothing": ([], {}, False),
    "false": (["--use_cpu", "false"], {}, False),
    "=no": (["--use_cpu=no"], {}, False),
    "dashed": (["--use-cpu", "0"], {}, False),
    "file": ([], {"use_cpu": False}, False),
    "text": ([], {"use_cpu": "false"}, False),
    "flag over file": (["--use_cpu", "false"], {"use_cpu": True}, False),
    "alone": (["--use_cpu"], {}, True),
    "true over file": (["--use_cpu=true"], {"use_cpu": False}, True),
    "last": (["--use_cpu", "false", "--use_cpu", "true"], {}, True),
}


@pytest.mark.parametrize("case", ON_A_GPU)
@pytest.mark.parametrize("command", ["train", "plan"])
def test_use_cpu_says_what_it_says_beside_a_gpu(
    command: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And bf16 stays as it is unless the run is on the CPU."""
    flags, settings, wanted = ON_A_GPU[case]
    monkeypatch.setattr("trl.SFTConfig.__post_init__", lambda self: None)  # looks for the device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    argv = ["--config", written(tmp_path / "a.yaml", **settings), *flags]
    asked = read_command(command, argv)
    assert (asked.sft.use_cpu, asked.sft.bf16) == (wanted, False if wanted else None)
    assert bool(asked.given.get("use_cpu")) == wanted
    assert read_command(command, [*argv, "--bf16", "true"]).sft.bf16 is True


def test_use_cpu_in_python_is_no_text() -> None:
    with pytest.raises(UserError, match="expected use_cpu as true or false; got 'false'"):
        LiftSFTConfig(output_dir="x", use_cpu="false")  # type: ignore[arg-type]
    assert LiftSFTConfig(output_dir="x", use_cpu=True).bf16 is False


def test_with_a_gpu_bf16_stays_on_unless_the_run_is_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, Any] = {}

    def stop(self: Any) -> None:
        seen.update(use_cpu=self.use_cpu, bf16=self.bf16)
        raise UserError("far enough")

    monkeypatch.setattr("trl.SFTConfig.__post_init__", stop)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for given, wanted in ((False, None), (True, False)):
        with pytest.raises(UserError, match="far enough"):
            LiftSFTConfig(output_dir="x", use_cpu=given)
        assert seen == {"use_cpu": given, "bf16": wanted}


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    paths = ("model_name_or_path", "dataset_name", "eval_dataset_name", "merged_dir")
    args = RunArguments(**{name: f"~/{name}" for name in paths})
    loop = ("output_dir", "resume_from_checkpoint", "chat_template_path")
    sft = LiftSFTConfig(use_cpu=True, **{name: f"~/{name}" for name in loop})
    for holder, names in ((args, paths), (sft, loop)):
        for name in names:
            assert getattr(holder, name) == os.path.join(tmp_path, name)
    assert RunArguments("a/~b", "c").model_name_or_path == "a/~b"


def test_rows_to_evaluate_on_are_evaluated_on(tmp_path: Path) -> None:
    path = written(tmp_path / "a.yaml", eval_dataset_name="rows.json")
    assert parse_train(["--config", path])[1].eval_strategy.value == "epoch"
    assert parse_train(["--config", path, "--eval_strategy", "no"])[1].eval_strategy.value == "no"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "liger": ({"use_liger_kernel": True}, "use_liger_kernel"),
    "fsdp": ({"fsdp": "full_shard"}, "fsdp"),
    "deepspeed": ({"deepspeed": {"stage": 3}}, "deepspeed"),
    "model_init_kwargs": ({"model_init_kwargs": {"dtype": "float16"}}, "model_init_kwargs"),
    "galore": ({"optim": "galore_adamw", "optim_target_modules": ["q"]}, "optim_target_modules"),
    "lomo": ({"optim": "lomo"}, "optim=lomo cannot be used"),
    "an unknown report": ({"report_to": ["paper"]}, "report_to=paper cannot be used"),
    "predict": ({"do_predict": True}, "use leanlift eval"),
    "dft and smoothing": (
        {"loss_type": "dft", "label_smoothing_factor": 0.1}, "no label smoothing"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_do_nothing_or_something_else_is_refused(case: str) -> None:
    changes, said = REFUSED[case]
    sft = LiftSFTConfig(**BASIC_LOOP)
    for name, value in changes.items():
        setattr(sft, name, value)
    with pytest.raises(UserError, match=said):
        check_settings(sft, LiftConfig())


def test_bf16_values_and_refreshes_ask_for_an_optimizer_that_can() -> None:
    bf16, refreshed = LiftConfig(values_dtype="bfloat16"), LiftConfig(refresh_interval=5)
    plain = LiftSFTConfig(**BASIC_LOOP)
    with pytest.raises(UserError, match="rounds small updates of bfloat16"):
        check_settings(plain, bf16)
    check_settings(plain, refreshed)
    check_settings(LiftSFTConfig(**BASIC_LOOP, optim="sparse_adamw"), bf16)
    with pytest.raises(UserError, match="refresh"):
        check_settings(LiftSFTConfig(**BASIC_LOOP, optim="adafactor"), refreshed)
    scaled = LiftSFTConfig(**BASIC_LOOP, optim="sparse_adamw")
    scaled.fp16 = True
    with pytest.raises(UserError, match="fp16 scales its loss"):
        check_settings(scaled, bf16)


@pytest.mark.parametrize("package", ["wandb", "tensorboard", "comet_ml"])
def test_a_package_that_is_missing_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in vars(integration_utils):
        if name.startswith("is_") and name.endswith("_available"):
            monkeypatch.setattr(integration_utils, name, lambda *args: False)
    with pytest.raises(UserError, match=f"report_to={package} cannot be used"):
        check_settings(LiftSFTConfig(**BASIC_LOOP, report_to=package), LiftConfig())


def _raised(error: BaseException, cause: BaseException) -> Exception:
    try:
        raise error from cause
    except Exception as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 2, "the disk is full"),
        (RuntimeError("PytorchStreamWriter: No space left on device"), 2, "the disk is full"),
        (_raised(ValueError("x"), OSError(errno.EDQUOT, "quota")), 2, "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "Permission denied"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 1 GiB."), 3, "out of memory"),
        (MemoryError(), 3, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 3, "out of memory"),
    ],
)
def test_a_full_disk_and_a_full_device_are_one_sentence(
    error: Exception, code: int, said: str
) -> None:
    text, found = in_a_sentence(error) or ("", 0)
    assert found == code
    assert said in text
    assert "\n" not in text
    assert in_a_sentence(RuntimeError("shapes do not match")) is None
