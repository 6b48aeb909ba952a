"""GRPO on problems with a number for an answer: TRL's trainer over a base in NF4.

    python examples/grpo_math.py                    # a tiny base and sums, made here: does it run?
    python examples/grpo_math.py --base Qwen/Qwen2.5-7B-Instruct --rows problems.jsonl --steps 500

In the directory of this file, `leanlift train --method grpo --reward_funcs grpo_math:right` does
the same by the command.

Rows have `prompt` and `answer` (a text that ends with the number, or a number). A completion is
rewarded by 1 if the number behind its "####", or else its last one, is that of the answer. Writes
the adapter and a merged fp16 checkpoint; what the tiny base learns in a minute is next to nothing.

The mask is random: reinforcement learning moves weights that are not principal (arXiv 2511.08567),
and a random hundredth of the weights does as well as all of them (arXiv 2602.01599).
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from small_base import make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from trl import GRPOConfig, GRPOTrainer

from leanlift import LiftCallback, LiftConfig, SparseAdamW, get_lift_model, merge_adapter

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def number_in(text: str) -> float | None:
    """The first number behind "####", or else the last of the text."""
    _, mark, behind = text.rpartition("####")
    found = NUMBER.findall(behind)
    return float(found[0 if mark else -1].replace(",", "")) if found else None


def right(completions: list[Any], answer: list[Any], **columns: Any) -> list[float]:
    """1 for each completion (a text, or a list of messages) with the number of its answer."""
    said = [each if isinstance(each, str) else each[-1]["content"] for each in completions]
    pairs = zip(said, answer, strict=True)
    return [float(number_in(text) == number_in(str(known))) for text, known in pairs]


def sums() -> list[dict[str, str]]:
    """Sums of two digits."""
    return [{"prompt": f"{a} + {b} =", "answer": f" #### {a + b}"}
            for a in range(10) for b in range(10)]  # fmt: skip


def make_tiny_base(place: Path) -> Path:
    """A Llama with half a million parameters that has seen sums for some seconds."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer([row["prompt"] + row["answer"] for row in sums()])
    size = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            num_attention_heads=4,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **size,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    texts = [f"{row['prompt']}{row['answer']}{tokenizer.eos_token}" for row in sums()]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for _ in range(100):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="directory or hub name; a tiny one is made without it")
    parser.add_argument("--rows", help="JSON or JSONL with prompt and answer; sums without it")
    parser.add_argument("--out", type=Path, default=Path("runs/grpo-math"))
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    cuda, tiny = torch.cuda.is_available(), options.base is None
    base = str(make_tiny_base(options.out / "tiny-base") if tiny else options.base)

    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = Dataset.from_list(sums())
    if options.rows:
        rows = load_dataset("json", data_files=options.rows, split="train")
    if tokenizer.chat_template:
        rows = rows.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})

    dtype = torch.bfloat16 if cuda else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=dtype,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    )
    model = get_lift_model(
        model, LiftConfig(selector="random", density=0.05, values_dtype="bfloat16")
    )
    rate = 5e-3 if tiny else 2e-5  # small models and sparse offsets want more than 7B
    trained = [p for p in model.parameters() if p.requires_grad]
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=right,
        args=GRPOConfig(
            output_dir=str(options.out),
            max_steps=options.steps,
            learning_rate=rate,
            beta=0.01,  # the reference is the base, with the adapter off; 0 does without one
            num_generations=8,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,  # 16 completions, so 2 prompts, to a step
            max_completion_length=12 if tiny else 512,
            gradient_checkpointing=not tiny,
            bf16=cuda,
            use_cpu=not cuda,
            save_strategy="steps",
            save_steps=100,
            logging_steps=5,
            report_to="none",
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        optimizers=(SparseAdamW(trained, lr=rate, moments="8bit"), None),  # rounds bf16 well
        callbacks=[LiftCallback()],
    )
    trainer.train()

    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    merged = options.out / "merged"
    merge_adapter(options.out, merged, dtype="float16", onto="original")
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    print(f"Right: {rewards[0]:.0%} in the first step, {rewards[-1]:.0%} in the last.")
    print(f"Adapter: {options.out}. Merged checkpoint: {merged}.")


if __name__ == "__main__":
    main()
