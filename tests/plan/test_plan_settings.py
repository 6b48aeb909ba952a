"""The settings of a plan: the defaults of a run, and what one function decides for both."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from planned import load_base
from sweeps import swept
from tiny import FORMATS, make_tokenizer

from leanlift import LiftConfig, LiftTrainer, PlanSettings, get_lift_model, plan_memory
from leanlift.measure import MemoryMeter
from leanlift.model import lift_state
from leanlift.training import LiftSFTConfig, MemoryCallback, RunArguments, plan_of

SHARED = {f.name for f in fields(PlanSettings)} - {
    "dtype", "cuda", "largest", "largest_eval",  # None: as the machine and the rest have it
}  # fmt: skip


def test_defaults_of_a_plan_are_those_of_a_run(checkpoints: dict[str, Path]) -> None:
    path = str(checkpoints["llama"])
    args, sft = RunArguments(path, "rows.json"), LiftSFTConfig(output_dir="x")
    plain = PlanSettings()
    for name in SHARED:
        holder = sft if hasattr(sft, name) else args
        default = getattr(holder, name)
        assert getattr(plain, name) == getattr(default, "value", default), name
    run = plan_of(args, sft)
    assert plan_memory(path).to_dict() == run.to_dict()
    assert plan_memory(path, LiftConfig()).to_dict() == run.to_dict()
    assert run.holds_for["base"] == "nf4"


@pytest.mark.parametrize("cuda", swept([False, True], True))
def test_what_is_evaluated_by_default_is_what_a_run_evaluates(
    checkpoints: dict[str, Path], cuda: bool
) -> None:
    path = str(checkpoints["llama"])
    sft = LiftSFTConfig(output_dir="x", eval_strategy="steps", eval_steps=1)
    run = plan_of(RunArguments(path, "rows.json"), sft, cuda)
    settings = PlanSettings(eval_strategy="steps", cuda=cuda)
    assert plan_memory(path, settings=settings).to_dict() == run.to_dict()
    assert run.phases["evaluate"] > 0


@pytest.mark.thorough
def test_a_default_run_needs_what_the_default_plan_says(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU: rows of other lengths, the longest as long as they may be."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    plan = plan_memory(checkpoints["llama"])
    model = get_lift_model(
        load_base(checkpoints["llama"], "nf4+double"), LiftConfig(), progress=False
    )
    meter = MemoryMeter(torch.device("cpu"))
    memory = MemoryCallback(meter)
    rows = [{"text": "0123456789 is " * times} for times in (40, 100)] * 4
    trainer = LiftTrainer(
        model=model,
        args=LiftSFTConfig(output_dir=str(tmp_path), max_steps=1),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
        callbacks=[memory],
    )
    trainer.train()
    assert memory.peak is not None
    measured = meter.report.categories
    for category, nbytes in plan.categories.items():
        if category != "activations and workspace":
            assert nbytes == measured[category], category
    assert abs(plan.phases["train"] / memory.peak - 1) <= 0.05, (plan.categories, measured)


@pytest.mark.parametrize("answer", swept([True, False], True))
def test_one_function_says_whether_the_scratch_is_needed(
    checkpoints: dict[str, Path], answer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both the layers of a model and a plan follow it, whatever it says."""
    monkeypatch.setattr("leanlift.layers.frozen.needs_scratch", lambda *facts: answer)
    config = LiftConfig(approx_rank=8)
    model = get_lift_model(load_base(checkpoints["llama"], "nf4"), config, progress=False)
    ids = torch.zeros(1, 8, dtype=torch.long)
    model(input_ids=ids, labels=ids).loss.backward()
    used = lift_state(model).scratch.nbytes
    for cuda in (False, True):
        settings = PlanSettings(max_length=16, dtype="float32", cuda=cuda, **FORMATS["nf4"])
        assert plan_memory(checkpoints["llama"], config, settings).categories["scratch"] == used
    assert used == (4 * 128 * 320 if answer else 0)
