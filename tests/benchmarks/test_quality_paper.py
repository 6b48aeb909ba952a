"""The runs for whoever has a GPU, on a tiny model: everything but the figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from sweeps import swept
from tiny import make_checkpoint
from transformers import Trainer

pytest.importorskip("peft")

from benchmarks.quality.paper import SUITES, Given, paper
from benchmarks.quality.paper.lift import Lift
from benchmarks.quality.paper.peers import Full, Lora
from benchmarks.quality.paper.suites import Setting, Suite
from benchmarks.quality.paper.table import read
from leanlift import UserError

STEPS = 12
TINY = {"max_steps": STEPS, "max_length": 128, "logging_steps": 4}
MASK = {"rank_budget": 2, "approx_rank": 2, "target_modules": ("q_proj", "v_proj")}
METHODS = {
    "principal-nf4": Lift("nf4", {**MASK, "refresh_interval": 5}, {"learning_rate": 1e-2}),
    "principal-16bit": Lift("16bit", {"density": 0.05, "approx_rank": 2}),
    "qlora-nf4": Lora("nf4", ("q_proj", "v_proj"), rank=2, alpha=4, autocast=False),
    "full-16bit": Full({"learning_rate": 1e-3}),
}
PAPERS = replace(
    SUITES["math"],
    settings={"tiny": Setting(1e-3, 2, 2, 5)},
    new_tokens=3,
    loop={**SUITES["math"].loop, **TINY, "per_device_train_batch_size": 2},
)
PEFTS = replace(
    SUITES["metamath"], methods=METHODS, new_tokens=3, loop={**SUITES["metamath"].loop, **TINY}
)
"""The suites, cut down to a model of two blocks."""


class Killed(BaseException):
    """In the place of SIGKILL: nothing catches it."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("paper") / "Tiny")


@pytest.fixture
def given(tmp_path: Path, base: Path) -> Given:
    return places(tmp_path, base)


def places(root: Path, base: Path) -> Given:
    """All that a user gives."""
    tests, rows = root / "tests", []
    tests.mkdir()
    for i in range(50):
        rows.append({"query": f"{i}+1?" + "x" * (i % 7), "response": f"The answer is: {i + 1}"})
    (root / "metamath.json").write_text(json.dumps(rows))
    asked = [{"question": f"{i}+1?", "answer": f"So.\n#### {i + 1}"} for i in range(6)]
    (tests / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    (root / "text.txt").write_text("One passage.\n***\nAnother one.\n")
    return Given(
        model=str(base),
        data=root / "metamath.json",
        tests=tests,
        output=root / "runs",
        text=root / "text.txt",
        results=root / "results",
    )


def said(lines: list[str]) -> Callable[[str], None]:
    return lines.append


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The process dies in this step."""
    real: Any = Trainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise Killed
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)


def adapter(given: Given, suite: Suite, method: str) -> Path:
    return next((given.output / suite.name / "tiny" / method / "run").glob("*model.safetensors"))


@pytest.mark.parametrize("method", swept(METHODS, "principal-nf4"))
def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(
    given: Given, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    given = replace(given, methods=(method,), limit=4)
    lines: list[str] = []
    with monkeypatch.context() as patch:
        kill_at(patch, 7)
        with pytest.raises(Killed):
            paper(PEFTS, given, said(lines))
    (row,) = paper(PEFTS, given, said(lines))
    (tmp_path / "other").mkdir()
    whole = replace(places(tmp_path / "other", base), methods=(method,), limit=4)
    paper(PEFTS, whole, said([]))
    one, other = (load_file(adapter(each, PEFTS, method)) for each in (given, whole))
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)
    assert row["steps"] == STEPS
    assert not list(given.output.rglob("checkpoint-*"))
    print("\n".join(lines))
