"""The demo: the whole path on a model small enough for any CPU.

A tiny Llama that knows a few string skills is loaded in NF4 with double quantization, 5 % of its
weights are trained on one more skill, and the result is merged into a plain fp16 checkpoint.
Everything is real: training, generation, files. Nothing is downloaded.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from leanlift.demo.ending import (
    NEXT,
    Skill,
    card,
    files_text,
    memory_text,
    needs_of_7b,
    seven_b_text,
    skills_text,
)
from leanlift.demo.skills import SOURCE_SKILLS, TARGET_SKILL, Row, make_rows
from leanlift.errors import UserError
from leanlift.evaluation.evaluate import quiet_loading
from leanlift.format import size
from leanlift.io.places import PREDICTIONS_NAME
from leanlift.report.data import read_run
from leanlift.report.page import write_page
from leanlift.training import LiftSFTConfig, RunArguments, plan_of, run
from leanlift.training.screens import Screen, Summary, screen_of

BASE = Path(__file__).parent / "base"
TRAIN_ROWS = 2000
HELD_OUT_ROWS = 100
BATCH = 100
STEPS = 312
SHOWN = 5
"""Answers of each skill that the page of the run gets to show."""


def demo(output_dir: str | Path) -> None:
    """Run the demo and print what came out.

    Raises:
        UserError: `output_dir` exists and is not empty.
    """
    out = Path(output_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty: name another directory with --output_dir.")
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # matrices this small only lose by sharing the work

    rows = make_rows(TARGET_SKILL, TRAIN_ROWS, split="train")
    held_out = {
        skill: make_rows(skill, HELD_OUT_ROWS, split="heldout", seed=1)
        for skill in (TARGET_SKILL, *SOURCE_SKILLS)
    }
    print(f"Base   a Llama of {_size(BASE)} that knows {', '.join(SOURCE_SKILLS)}; held in NF4")
    print(f"Task   {TARGET_SKILL!r}, which it does not know:  {_example(rows[0])}")
    print("Trains 5 % of its weights, on this machine's CPU, offline\n", flush=True)

    before: dict[str, list[str]] = {}

    def measure(model: Any, tokenizer: Any) -> None:
        before.update(_answers(model, tokenizer, held_out, "Before training"))

    args, sft = _settings(out, rows)
    result = run(
        args,
        sft,
        before_training=measure,
        plan=partial(plan_of, args, sft, False),
        screen=cast(Any, _WithoutSummary(screen_of("auto"))),
    )
    after = _answers(result.model, result.tokenizer, held_out, "After training")

    with quiet_loading():
        merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float16)
    stock = _answers(
        merged.float(), AutoTokenizer.from_pretrained(out / "merged"), held_out, "Merged, stock"
    )
    _write_predictions(out / "run" / PREDICTIONS_NAME, held_out, before, after)
    page = write_page(read_run(out / "run"))
    same = sum(stock[s][i] == after[s][i] for s in held_out for i in range(HELD_OUT_ROWS))
    total = HELD_OUT_ROWS * len(held_out)
    for text in (
        skills_text(_skills(held_out, before, after, stock), HELD_OUT_ROWS),
        memory_text(result.memory.to_dict()),
        files_text(out / "run", out / "merged", page, same, total),
    ):
        print(f"\n{text}", flush=True)
    print(f"\n{seven_b_text(needs_of_7b(), card())}")
    print(f"\n{NEXT}")


def _settings(out: Path, rows: list[Row]) -> tuple[RunArguments, LiftSFTConfig]:
    """Of the demo's run, whose rows are written first."""
    data = out / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    args = RunArguments(
        model_name_or_path=str(BASE),
        dataset_name=str(data),
        density=0.05,
        approx_rank=16,
        refresh_interval=100,
        merged_dir=str(out / "merged"),
        merge_onto="quantized",
    )
    sft = LiftSFTConfig(
        output_dir=str(out / "run"),
        use_cpu=True,
        bf16=False,
        learning_rate=1e-3,
        per_device_train_batch_size=16,
        max_steps=STEPS,
        max_length=64,
        logging_steps=20,
        save_strategy="no",
        gradient_checkpointing=False,
    )
    return args, sft


def _skills(held_out: dict[str, list[Row]], *answers: dict[str, list[str]]) -> list[Skill]:
    """How much of each skill is right before training, after it, and merged."""
    return [
        Skill(
            skill,
            skill != TARGET_SKILL,
            *(_right(held_out[skill], given[skill]) for given in answers),
        )
        for skill in held_out
    ]


class _WithoutSummary:
    """The screen of a run, whose end the demo tells in its own words."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen

    def __getattr__(self, name: str) -> Any:
        return getattr(self.screen, name)

    def summary(self, summary: Summary) -> None: ...


def greedy_answers(model: Any, tokenizer: Any, prompts: list[str], what: str) -> list[str]:
    """The greedy completion of each prompt, up to the end token."""
    answers: list[str] = []
    was_training = model.training
    model.eval()
    batches = range(0, len(prompts), BATCH)
    for start in tqdm(batches, desc=what, unit="batch", leave=False, disable=None):
        batch = tokenizer(prompts[start : start + BATCH], return_tensors="pt", padding=True,
                          padding_side="left", add_special_tokens=False)  # fmt: skip
        with torch.no_grad():
            out = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=12,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        new = out[:, batch["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(new, skip_special_tokens=True)
    model.train(was_training)
    return answers


def _answers(
    model: Any, tokenizer: Any, held_out: dict[str, list[Row]], what: str
) -> dict[str, list[str]]:
    """Greedy answers per skill."""
    rows = [row for skill in held_out.values() for row in skill]
    answers = iter(greedy_answers(model, tokenizer, [row["prompt"] for row in rows], what))
    return {skill: [next(answers) for _ in rows] for skill, rows in held_out.items()}


def _right(rows: list[Row], answers: list[str]) -> float:
    """Share of exact answers."""
    return sum(a == row["completion"] for a, row in zip(answers, rows, strict=True)) / len(rows)


def _write_predictions(
    path: Path,
    held_out: dict[str, list[Row]],
    before: dict[str, list[str]],
    after: dict[str, list[str]],
) -> None:
    """A few rows of each skill with both answers, for the page."""
    lines = []
    for skill, rows in held_out.items():
        for row, was, now in list(zip(rows, before[skill], after[skill], strict=True))[:SHOWN]:
            answers = {"before": was, "after": now}
            right = {name: text == row["completion"] for name, text in answers.items()}
            data = {"prompt": row["prompt"], "expected": row["completion"]}
            lines.append(json.dumps({**data, "answers": answers, "right": right}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def _example(row: Row) -> str:
    return f"{row['prompt']}{row['completion']}"


def _size(directory: Path) -> str:
    return size(sum(file.stat().st_size for file in directory.iterdir()))
