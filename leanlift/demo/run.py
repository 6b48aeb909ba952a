"""The demo: the whole path on a model small enough for any CPU.

A tiny Llama that knows a few string skills is loaded in NF4 with double quantization, 5 % of its
weights are trained on one more skill, and the result is merged into a plain fp16 checkpoint.
Everything is real: training, generation, files. Nothing is downloaded.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from leanlift.adapter import WEIGHTS_NAME
from leanlift.demo.skills import SOURCE_SKILLS, TARGET_SKILL, Row, make_rows
from leanlift.errors import UserError
from leanlift.memory import format_report, human
from leanlift.model import lift_layers
from leanlift.training import LiftSFTConfig, RunArguments, plan_of, run

BASE = Path(__file__).parent / "base"
TRAIN_ROWS = 2000
HELD_OUT_ROWS = 100
BATCH = 100
STEPS = 312


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

    data = out / "train.jsonl"
    rows = make_rows(TARGET_SKILL, TRAIN_ROWS, split="train")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    held_out = {
        skill: make_rows(skill, HELD_OUT_ROWS, split="heldout", seed=1)
        for skill in (TARGET_SKILL, *SOURCE_SKILLS)
    }
    print(f"Base: a {_size(BASE)} Llama that knows {', '.join(SOURCE_SKILLS)}. It is loaded in NF4")
    print(f"with double quantization and learns {TARGET_SKILL!r} from {data}, for example")
    print(f"    {rows[0]['prompt']}{rows[0]['completion']}")

    before: dict[str, list[str]] = {}

    def measure(model: Any, tokenizer: Any) -> None:
        before.update(_answers(model, tokenizer, held_out, "Before training"))

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
        logging_steps=50,
        save_strategy="no",
        gradient_checkpointing=False,
    )
    result = run(args, sft, before_training=measure, plan=partial(plan_of, args, sft, False))
    after = _answers(result.model, result.tokenizer, held_out, "After training")

    merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float16)
    stock = _answers(
        merged.float(), AutoTokenizer.from_pretrained(out / "merged"), held_out, "Merged, stock"
    )
    _print_results(held_out, before, after, stock)
    print()
    print(format_report(result.memory.to_dict()))
    layers = lift_layers(result.model).values()
    entries = sum(layer.index.count for layer in layers)
    index = sum(layer.index.nbytes for layer in layers)
    adapter = (out / "run" / WEIGHTS_NAME).stat().st_size
    print(
        f"\nAdapter: {human(adapter)} on disk ({out / 'run'}); {entries:,} trained entries, whose"
    )
    print(f"index takes {human(index)}, {index / entries:.2f} bytes per entry.")
    print(f"Merged fp16 checkpoint: {out / 'merged'}")
    same = sum(stock[s][i] == after[s][i] for s in held_out for i in range(HELD_OUT_ROWS))
    total = HELD_OUT_ROWS * len(held_out)
    print(
        f"Stock AutoModelForCausalLM.from_pretrained on it gives the trained model's greedy answer "
        f"in {same} of {total} cases."
    )


def greedy_answers(model: Any, tokenizer: Any, prompts: list[str], what: str) -> list[str]:
    """The greedy completion of each prompt, up to the end token."""
    answers: list[str] = []
    was_training = model.training
    model.eval()
    for start in tqdm(range(0, len(prompts), BATCH), desc=what, unit="batch", leave=False):
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
    return {
        skill: greedy_answers(model, tokenizer, [row["prompt"] for row in rows], f"{what}: {skill}")
        for skill, rows in held_out.items()
    }


def _print_results(held_out: dict[str, list[Row]], *columns: dict[str, list[str]]) -> None:
    print(f"\nExact answers on {HELD_OUT_ROWS} held-out examples per skill:")
    print(f"{'skill':<24}{'before':>10}{'after':>10}{'merged fp16':>14}")
    for skill, rows in held_out.items():
        shares = [
            sum(
                answer == row["completion"] for answer, row in zip(column[skill], rows, strict=True)
            )
            / len(rows)
            for column in columns
        ]
        label = f"{skill} ({'learned now' if skill == TARGET_SKILL else 'known before'})"
        print(f"{label:<24}{shares[0]:>10.0%}{shares[1]:>10.0%}{shares[2]:>14.0%}")


def _size(directory: Path) -> str:
    return human(sum(file.stat().st_size for file in directory.iterdir()))
