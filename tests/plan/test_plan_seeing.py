"""The plan of a model that sees against a real step, over rows of text and over pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from runs import settings
from seeing import make_seeing, rows_with_pictures
from sweeps import swept
from tiny import make_tokenizer, quantization
from towers import PATCH, SEEING, SIDE, WITH_PROCESSOR, tokenizer_with
from transformers import AutoConfig

from leanlift import LiftConfig, LiftTrainer, PlanSettings, get_lift_model, plan_memory
from leanlift.measure import MemoryMeter
from leanlift.plan import Batch, Known, MemoryPlan
from leanlift.plan.auto import auto_class
from leanlift.plan.base import NOT_COUNTED
from leanlift.plan.seen import Seen
from leanlift.training import MemoryCallback, RunArguments, plan_of, run
from leanlift.training.batches import Batches

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


@pytest.mark.thorough
@pytest.mark.parametrize("cuda", swept([False, True], True), ids=["cpu", "cuda"])
def test_an_embedding_that_is_on_the_cpu_is_planned(cuda: bool, tmp_path: Path) -> None:
    path = make_seeing(tmp_path / "base", "llava")
    plain, moved = (
        plan_memory(path, CONFIG, PlanSettings(cuda=cuda, dtype="bfloat16", embedding_on_cpu=moves))
        for moves in (False, True)
    )
    embeddings = [plan.categories["embeddings and head"] for plan in (plain, moved)]
    assert (embeddings[1] < embeddings[0]) == cuda


WIDE = "llava, wide"


def over_pictures(base: Path, place: Path, **changes: Any) -> tuple[Any, MemoryPlan]:
    """What a run over pictures has measured, and its plan of them."""
    data = rows_with_pictures(place / "rows")
    args = RunArguments(str(base), str(data), density=0.05, approx_rank=8, dtype="float32")
    loop = {"max_steps": 3, "gradient_checkpointing": False, "optim": "sparse_adamw", **changes}
    sft, plans = settings(place / "run", **loop), list[MemoryPlan]()

    def planned(batches: Batches) -> MemoryPlan:
        plans.append(plan_of(args, sft, False, batches))
        return plans[-1]

    return run(args, sft, plan=planned).memory, plans[0]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("checkpointing", swept([False, True], False), ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", swept([WIDE, *WITH_PROCESSOR], WIDE))
def test_a_step_over_pictures_needs_what_was_planned(
    kind: str, checkpointing: bool, tmp_path: Path
) -> None:
    """In a tower that is as narrow as the language model, and in one where a step peaks."""
    family, width = kind.removesuffix(", wide"), 8192 if kind == WIDE else None
    base = make_seeing(tmp_path / "base", family, width)
    measured, before = over_pictures(
        base, tmp_path, gradient_checkpointing=checkpointing, per_device_train_batch_size=4
    )
    peak = measured.phases["train"].tensors
    assert peak is not None
    assert measured.plan is not None
    assert abs(measured.plan["phases"]["train"] / peak - 1) <= 0.005
    assert before.phases["train"] >= 0.995 * peak  # of batches that had not been seen
    assert any(note.startswith("images: as large as") for note in before.notes)
    batch = Batch(4, measured.plan["holds_for"]["max_length"], padded=True)
    of_text = PlanSettings(cuda=False, dtype="float32", gradient_checkpointing=checkpointing,
                           optim="sparse_adamw", largest=batch)  # fmt: skip
    blind = plan_memory(base, LiftConfig(density=0.05, approx_rank=8), of_text, images=True)
    assert NOT_COUNTED in blind.notes
    assert blind.phases["train"] < (0.75 if kind == WIDE else 1.001) * before.phases["train"]


def test_pictures_that_a_models_code_does_not_run_over_are_said_not_to_be_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_seeing(tmp_path / "base", "llava")

    def fails(*args: Any, **given: Any) -> Any:
        raise RuntimeError("numbers that are not there")

    monkeypatch.setattr(transformers.LlavaModel, "get_image_features", fails)
    seen = seen_by(1, 24)
    options = PlanSettings(cuda=False, dtype="float32", largest=Batch(1, 24, seen=seen))
    plan = plan_memory(base, CONFIG, options, images=True)
    assert NOT_COUNTED in plan.notes
    assert plan.peak > 0


def seen_by(rows: int, tokens: int) -> Seen:
    """A batch for the tiny LLaVA, as its processor makes it."""
    ids = torch.full((rows, tokens), 5)
    ids[:, 2 : 2 + (SIDE // PATCH) ** 2] = tokenizer_with("<image>").image_token_id
    pixels = torch.randn(rows, 3, SIDE, SIDE)
    found = Seen.of({"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids),
                     "pixel_values": pixels})  # fmt: skip
    assert found is not None
    return found


def test_rows_like_one_that_was_seen_make_a_batch() -> None:
    seen = seen_by(1, 24)
    assert Seen.of({"input_ids": seen.tensors["input_ids"]}) is None  # of text alone
    assert not seen.inputs(3, 30, padded=True)["attention_mask"].all()
    made = seen.inputs(3, 30)
    assert made["pixel_values"].shape == (3, 3, SIDE, SIDE)
    assert made["input_ids"].shape == made["attention_mask"].shape == (3, 30)
    for key, tensor in seen.tensors.items():
        assert all(torch.equal(row, tensor[0]) for row in made[key][..., :24])
    assert "labels" not in made
    assert seen_by(1, 24) == seen  # whatever the pixels are
    assert seen_by(1, 25) != seen


def test_the_pictures_of_a_whole_step_are_on_the_card_at_once(tmp_path: Path) -> None:
    base, seen = make_seeing(tmp_path / "base", "llava"), seen_by(1, 24)
    options = PlanSettings(dtype="float32", largest=Batch(2, 24, seen=seen))
    known: Known = {}

    def peak(cuda: bool, batches: int) -> int:
        changed = replace(options, cuda=cuda, gradient_accumulation_steps=batches)
        plan = plan_memory(base, CONFIG, changed, images=True, known=known)
        return plan.phases["train"]

    assert peak(True, 4) - peak(True, 2) == 2 * 2 * seen.nbytes
    assert peak(False, 4) == peak(False, 2)
