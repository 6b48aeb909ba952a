"""The plan of a model that sees against a real step over rows of text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import settings
from seeing import make_seeing
from sweeps import swept
from tiny import make_tokenizer, quantization
from towers import SEEING
from transformers import AutoConfig

from leanlift import LiftConfig, LiftTrainer, PlanSettings, get_lift_model, plan_memory
from leanlift.measure import MemoryMeter
from leanlift.plan import Batch
from leanlift.plan.auto import auto_class
from leanlift.training import MemoryCallback

CONFIG = LiftConfig(density=0.05, approx_rank=8)
ROWS = [{"text": "0123456789 is " * 40}] * 8


@pytest.mark.parametrize("kind", swept(SEEING, "gemma3"))
def test_a_step_over_text_needs_what_was_planned(kind: str, tmp_path: Path) -> None:
    path = make_seeing(tmp_path / "base", kind)
    planned = plan_memory(
        path, CONFIG, PlanSettings(cuda=False, dtype="float32", gradient_checkpointing=False,
                                   optim="adamw_torch", largest=Batch(4, 256)),
    )  # fmt: skip
    base = auto_class(AutoConfig.from_pretrained(path), str(path)).from_pretrained(
        path, dtype=torch.float32, quantization_config=quantization("nf4+double")
    )
    memory = MemoryCallback(MemoryMeter(torch.device("cpu")))
    trainer = LiftTrainer(
        get_lift_model(base, CONFIG, progress=False),
        settings(tmp_path / "run", max_steps=2, max_length=256, warmup_steps=0),
        ROWS, processing_class=make_tokenizer(), callbacks=[memory],
    )  # fmt: skip
    trainer.train()
    measured = memory.meter.report.categories
    for name in ("base weights", "embeddings and head", "norms and other", "scratch"):
        assert planned.categories[name] == measured[name], name
    assert memory.peak is not None
    assert abs(planned.phases["train"] / memory.peak - 1) <= 0.05
    whole = "text part" if kind == "qwen3_5" else "the rest is frozen"
    assert whole in " ".join(planned.notes)


@pytest.mark.parametrize("cuda", swept([False, True], True), ids=["cpu", "cuda"])
def test_an_embedding_that_is_on_the_cpu_is_planned(cuda: bool, tmp_path: Path) -> None:
    path = make_seeing(tmp_path / "base", "llava")
    plain, moved = (
        plan_memory(path, CONFIG, PlanSettings(cuda=cuda, dtype="bfloat16", embedding_on_cpu=moves))
        for moves in (False, True)
    )
    embeddings = [plan.categories["embeddings and head"] for plan in (plain, moved)]
    assert (embeddings[1] < embeddings[0]) == cuda
