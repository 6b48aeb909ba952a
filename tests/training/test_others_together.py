"""TRL's trainers with `LiftCallback` in two processes: both train the same, and one writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import free_port

TESTS = Path(__file__).parent.parent


def train(method: str, base: Path, output: Path, **given: Any) -> list[dict[str, Any]] | str:
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
def test_both_train_the_same_and_go_on_to_the_bit(base: Path, tmp_path: Path, method: str) -> None:
    one, two = train(method, base, tmp_path / "run")
    assert one == two
    assert one["refreshes"] == 1
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"memory.json", "checkpoint-3", "checkpoint-4"} <= names
    assert not [name for name in names if "partial" in name]
    checkpoint = tmp_path / "run" / "checkpoint-3"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert train(method, base, tmp_path / "run", resume=str(checkpoint)) == [one, two]


@pytest.mark.thorough
@pytest.mark.parametrize("process", [0, 1])
def test_a_gradient_that_is_not_finite_in_one_drops_the_step_of_all(
    base: Path, tmp_path: Path, process: int
) -> None:
    one, two = train("dpo", base, tmp_path / "run", bad=[process, 1])
    assert one == two
    assert one["skipped"] == 1


@pytest.mark.thorough
def test_other_positions_in_one_are_refused(base: Path, tmp_path: Path) -> None:
    said = train("dpo", base, tmp_path / "run", other_seed=True)
    assert "are others in process 1 than in the first" in said
    assert not list((tmp_path / "run").glob("checkpoint-*"))
