"""A training step over long rows: planned against measured peak, plain and in pieces.

    python -m benchmarks.long_context [--length 16384] [--threads 1] [--quick]

A Llama of one block as wide as an 8B model's (hidden 4096, intermediate 14336, 32 heads, 8 of keys
and values) and a small vocabulary, with random bf16 weights, goes the way of `leanlift train` on a
CPU: plan, load in NF4, select 5 %, one step of one row, recomputed, with 16-bit offsets, 8-bit
moments and updates in the backward pass. The measured peak is of live tensor bytes. `--quick` takes
a small block, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.common import write_rows
from leanlift.demo.run import BASE
from leanlift.training import LiftSFTConfig, RunArguments, plan_of, run

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tiled_mlp": {"tiled_mlp": True},
    "stream_base": {"stream_base": True},
    "tiled_mlp, stream_base": {"tiled_mlp": True, "stream_base": True},
}
FULL = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8,
}  # fmt: skip
QUICK = {
    "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8,
    "num_key_value_heads": 2,
}  # fmt: skip


def write_base(path: Path, shape: dict[str, int], length: int) -> None:
    """The checkpoint and its tokenizer."""
    config = LlamaConfig(
        **shape, num_hidden_layers=1, vocab_size=256, max_position_embeddings=length
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    for file in BASE.glob("*token*"):
        shutil.copy(file, path)


def row(name: str, work: Path, length: int) -> dict[str, Any]:
    """One run of one step."""
    output = work / "run"
    shutil.rmtree(output, ignore_errors=True)
    args = RunArguments(
        model_name_or_path=str(work / "base"),
        dataset_name=str(work / "rows.jsonl"),
        selector="magnitude",
        density=0.05,
        dtype="bfloat16",
        values_dtype="bfloat16",
        **CASES[name],
    )
    sft = LiftSFTConfig(
        output_dir=str(output),
        use_cpu=True,
        bf16=False,
        max_steps=1,
        per_device_train_batch_size=1,
        max_length=length,
        gradient_checkpointing=True,
        optim="sparse_adamw_8bit",
        optim_in_backward=True,
        max_grad_norm=0.0,
        save_strategy="no",
        disable_tqdm=True,
    )
    begun = time.monotonic()
    memory = run(args, sft, plan=partial(plan_of, args, sft, False)).memory
    measured, planned = memory.phases["train"].tensors, memory.plan
    assert measured is not None
    assert planned is not None
    assert planned["holds_for"]["max_length"] == length
    return {
        "setting": name,
        "tokens": length,
        "planned": planned["phases"]["train"],
        "measured": measured,
        "planned / measured": round(planned["phases"]["train"] / measured, 4),
        "activations, planned": planned["categories"]["activations and workspace"],
        "seconds of the run": round(time.monotonic() - begun, 1),
    }


def rows_of(work: Path, length: int, shape: dict[str, int]) -> list[dict[str, Any]]:
    """All cases, one after the other."""
    write_base(work / "base", shape, length)
    text = json.dumps({"text": "reverse abc is cba " * length}) + "\n"
    (work / "rows.jsonl").write_text(text * 2, encoding="utf-8")
    found = []
    for name in CASES:
        found.append(row(name, work, length))
        print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, help="tokens of the row (16384; quick: 4096)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a small block; nothing is kept")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    length = arguments.length or (4096 if arguments.quick else 16384)
    with tempfile.TemporaryDirectory() as directory:
        rows = rows_of(Path(directory), length, QUICK if arguments.quick else FULL)
    worst = max(abs(r["planned / measured"] - 1) for r in rows)
    print(f"The plan is off by {worst:.1%} at most.")
    if not arguments.quick:
        print(f"Wrote {write_rows('long_context', rows)}")


if __name__ == "__main__":
    main()
