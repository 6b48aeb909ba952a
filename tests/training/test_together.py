"""Two processes that train one model, over gloo: the same as one with both batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import free_port
from safetensors.torch import load_file

TESTS = Path(__file__).parent.parent
REFRESHED = {"refresh_interval": 6}


def train(
    processes: int, base: Path, output: Path, fails: bool = False, **given: Any
) -> subprocess.CompletedProcess[str]:
    """A run in so many processes."""
    launcher = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes),
                    "--master_port", str(free_port()), "--monitor_interval", "0.2"]  # fmt: skip
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    done = subprocess.run(
        [sys.executable, *launcher, str(TESTS / "together.py"), str(base), str(output),
         json.dumps(given)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done


def tensors(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter_model.safetensors")


def assert_same(one: Path, other: Path) -> None:
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    assert any("settled" in key for key in first)  # it was refreshed
    assert all(torch.equal(first[key], second[key]) for key in first)


# What two processes are told beside what one is told; the latter accumulates two batches of theirs.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "clipped": ({"max_grad_norm": 0.05}, {}),
    "8 bits": ({"optim": "sparse_adamw_8bit", "gradient_checkpointing": True}, {}),
    "bf16 values": (
        {"optim": "sparse_adamw", "lift": {"values_dtype": "bfloat16", **REFRESHED}},
        {},
    ),
    "in backward": (
        {"optim": "sparse_adamw", "max_grad_norm": 0},
        {"optim_in_backward": True},
    ),
    "packed": ({"packing": True, "max_length": 32, "max_steps": 10}, {}),
    "a 16-bit base": ({"kind": "dense"}, {}),
}


@pytest.mark.thorough
@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one_with_both_batches(base: Path, tmp_path: Path, case: str) -> None:
    common, more = CASES[case]
    common = {"lift": REFRESHED, **common}
    train(1, base, tmp_path / "one", gradient_accumulation_steps=2, **common)
    train(2, base, tmp_path / "two", **common, **more)
    assert_same(tmp_path / "one", tmp_path / "two")
    states = [
        json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        for name in ("one", "two")
    ]
    for one, two in zip(*states, strict=True):
        for key in ("loss", "num_tokens", "refresh_churn"):
            assert (key in one) == (key in two)
            assert one.get(key, 0) == pytest.approx(two.get(key, 0), rel=1e-6), key
    if case != "in backward":
        optimizers = [
            load_file(tmp_path / name / "checkpoint-8" / "optimizer.safetensors")
            for name in ("one", "two")
        ]
        for key, value in optimizers[0].items():
            assert torch.equal(value, optimizers[1][key]), key


@pytest.mark.thorough
def test_accumulated_in_two_it_is_the_same_within_rounding(base: Path, tmp_path: Path) -> None:
    """Sums of four batches are formed in another order."""
    train(1, base, tmp_path / "one", gradient_accumulation_steps=4, max_steps=8)
    train(2, base, tmp_path / "two", gradient_accumulation_steps=2, max_steps=8)
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    for key, value in one.items():
        if key.endswith(".values"):
            assert torch.allclose(value, two[key], atol=2e-5), key
        else:
            assert torch.equal(value, two[key])


@pytest.mark.thorough
@pytest.mark.parametrize("process", [0, 1])
def test_one_that_is_killed_ends_all_and_the_run_goes_on(
    base: Path, tmp_path: Path, process: int
) -> None:
    train(2, base, tmp_path / "whole", lift=REFRESHED)
    ended = train(2, base, tmp_path / "run", lift=REFRESHED, killed=[process, 13], fails=True)
    assert "SIGKILL" in ended.stderr
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left <= {"checkpoint-8", ".lock"}
    train(2, base, tmp_path / "run", lift=REFRESHED, resume=True)
    assert_same(tmp_path / "whole", tmp_path / "run")
    assert not list((tmp_path / "run").glob(".saving*"))


@pytest.mark.thorough
@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("in_backward", [False, True])
def test_a_loss_that_is_not_finite_in_one_drops_the_step_of_all(
    base: Path, tmp_path: Path, process: int, in_backward: bool
) -> None:
    more: dict[str, Any] = {"optim": "sparse_adamw", "max_grad_norm": 0,
                            "optim_in_backward": True} if in_backward else {}  # fmt: skip
    done = train(2, base, tmp_path / "run", bad=[process, 4], max_steps=8, **more)
    assert "process 0: 1 skipped" in done.stdout
    assert "process 1: 1 skipped" in done.stdout
    if not in_backward:  # else it is added up before it is looked at
        assert "another process has a loss or gradient that is not finite" in done.stderr
    assert all(bool(t.isfinite().all()) for k, t in tensors(tmp_path / "run").items()
               if k.endswith("values"))  # fmt: skip


@pytest.mark.thorough
def test_other_positions_in_one_are_refused(base: Path, tmp_path: Path) -> None:
    ended = train(2, base, tmp_path / "run", other_seed=True, fails=True)
    assert "are others in process 1 than in the first" in ended.stderr
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.thorough
def test_a_run_goes_on_with_as_many_processes(base: Path, tmp_path: Path) -> None:
    train(2, base, tmp_path / "run", max_steps=8)
    ended = train(1, base, tmp_path / "run", max_steps=8, resume=True, fails=True)
    assert "processes=2, and this run asks for processes=1" in ended.stderr


@pytest.mark.thorough
def test_the_command_trains_in_two(base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} plus {i} is ", "completion": str(2 * i)} for i in range(48)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
         "--master_port", str(free_port()), "-m", "leanlift", "train",
         "--model_name_or_path", str(base), "--dataset_name", str(tmp_path / "rows.jsonl"),
         "--output_dir", str(run), "--max_steps", "4", "--refresh_interval", "2",
         "--use_cpu", "true", "--bf16", "false", "--dtype", "float32", "--save_steps", "2",
         "--merged_dir", str(tmp_path / "merged")],
        env={**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("trained     4 steps") == 1  # one speaks for both
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert {"memory.json", "run.json", "checkpoint-4"} <= {path.name for path in run.iterdir()}
    assert not list(run.glob("*.partial"))


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_what_cuts_a_model_into_parts_is_refused(
    base: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runs import settings

    from leanlift import LiftConfig, UserError
    from leanlift.training.checks import check_settings

    loop = settings(tmp_path)
    check_settings(loop, LiftConfig())
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(UserError, match=r"keeps the whole base in each process: .*--multi_gpu"):
        check_settings(loop, LiftConfig())


def train_other(method: str, base: Path, output: Path, **given: Any) -> list[dict[str, Any]] | str:
    """What each process ends with; or what was said where they failed."""
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
         "--master_port", str(free_port()), "--monitor_interval", "0.2",
         str(TESTS / "together_others.py"), method, str(base), str(output), json.dumps(given)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if done.returncode:
        return done.stderr
    return [json.loads((output / f"process-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_both_of_another_trainer_do_the_same_and_go_on(
    base: Path, tmp_path: Path, method: str
) -> None:
    one, two = train_other(method, base, tmp_path / "run")
    assert one == two
    assert one["refreshes"] == 1
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"memory.json", "checkpoint-3", "checkpoint-4"} <= names
    assert not [name for name in names if "partial" in name]
    checkpoint = tmp_path / "run" / "checkpoint-3"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert train_other(method, base, tmp_path / "run", resume=str(checkpoint)) == [one, two]


@pytest.mark.thorough
@pytest.mark.parametrize("process", [0, 1])
def test_a_bad_gradient_in_one_drops_the_step_of_all_in_another_trainer(
    base: Path, tmp_path: Path, process: int
) -> None:
    one, two = train_other("dpo", base, tmp_path / "run", bad=[process, 1])
    assert one == two
    assert one["skipped"] == 1


@pytest.mark.thorough
def test_other_positions_in_one_are_refused_in_another_trainer(base: Path, tmp_path: Path) -> None:
    said = train_other("dpo", base, tmp_path / "run", other_seed=True)
    assert "are others in process 1 than in the first" in said
    assert not list((tmp_path / "run").glob("checkpoint-*"))
