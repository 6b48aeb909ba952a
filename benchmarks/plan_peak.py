"""Planned against measured peak of whole runs, in many settings.

    python -m benchmarks.plan_peak [--device cuda] [--hidden 512] [--layers 4] [--length 256]

A Llama with random weights is written to disk, and each setting goes the way of `leanlift train`:
plan, load in NF4, select, three steps. On a CPU the measured peak is of live tensor bytes, on CUDA
the allocator's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.common import write_rows
from leanlift.demo.run import BASE
from leanlift.training import LiftSFTConfig, RunArguments, plan_of, run

BACKWARD = {"optim": "sparse_adamw_8bit", "optim_in_backward": True, "max_grad_norm": 0.0}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch 4": {"per_device_train_batch_size": 4},
    "half the length": {"length": 0.5},
    "twice the length": {"length": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointing, batch 4": {"gradient_checkpointing": True, "per_device_train_batch_size": 4},
    "accumulation": {"gradient_accumulation_steps": 4},
    "accumulation, checkpointing": {
        "gradient_accumulation_steps": 4,
        "gradient_checkpointing": True,
    },
    "torch AdamW": {"optim": "adamw_torch"},
    "bitsandbytes 8 bit": {"optim": "adamw_8bit"},
    "SparseAdamW 8 bit": {"optim": "sparse_adamw_8bit"},
    "bf16 values": {"optim": "sparse_adamw_8bit", "values_dtype": "bfloat16"},
    "in backward": BACKWARD,
    "in backward, checkpointing": {**BACKWARD, "gradient_checkpointing": True},
    "INT8 ends": {"quantize_embeddings": True},
    "offloaded": {
        **BACKWARD,
        "gradient_checkpointing": True,
        "quantize_embeddings": True,
        "embedding_on_cpu": True,
        "values_dtype": "bfloat16",
    },
    "bf16 model": {"dtype": "bfloat16"},
    "INT8 base": {"load_in_8bit": True},
}
OFFLOADED = {**CASES["offloaded"], "activation_offloading": True}


def write_base(path: Path, hidden: int, layers: int) -> None:
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11008 // 4096,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        vocab_size=8192,
        max_position_embeddings=4096,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    for file in BASE.glob("*token*"):
        shutil.copy(file, path)


def row(name: str, changes: dict[str, Any], work: Path, arguments: Any) -> dict[str, Any]:
    """One run."""
    cuda = arguments.device == "cuda"
    changes = dict(changes)
    length = int(arguments.length * changes.pop("length", 1))
    known = RunArguments.__dataclass_fields__
    base = {key: changes.pop(key) for key in list(changes) if key in known}
    shutil.rmtree(work / "run", ignore_errors=True)
    args = RunArguments(
        model_name_or_path=str(work / "base"),
        dataset_name=str(work / "rows.jsonl"),
        selector="magnitude",
        **{"dtype": "bfloat16" if cuda else "float32", **base},
    )
    options: dict[str, Any] = {
        "output_dir": str(work / "run"),
        "use_cpu": not cuda,
        "bf16": cuda,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "max_length": length,
        "gradient_checkpointing": False,
        "optim": "sparse_adamw",
        "save_strategy": "no",
        "disable_tqdm": True,
        **changes,
    }
    sft = LiftSFTConfig(**options)
    memory = run(args, sft, plan=partial(plan_of, args, sft, cuda)).memory
    measured = memory.phases["train"].tensors
    assert measured is not None
    assert memory.plan is not None
    planned = memory.plan["phases"]["train"]  # for the largest batch that was measured
    return {
        "setting": name,
        "planned": planned,
        "measured": measured,
        "planned / measured": round(planned / measured, 4),
        "reserved": memory.phases["train"].reserved or "",
    }


def rows_of(cases: dict[str, dict[str, Any]], arguments: Any) -> list[dict[str, Any]]:
    """A run in each of these settings, as they come."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        write_base(work / "base", arguments.hidden, arguments.layers)
        write_rows_file(work / "rows.jsonl", arguments.length)
        for name, changes in cases.items():
            rows.append(row(name, changes, work, arguments))
            print(rows[-1], flush=True)
    return rows


def write_rows_file(path: Path, length: int) -> None:
    """64 rows of more than so many tokens."""
    text = json.dumps({"text": "reverse abc is cba " * length}) + "\n"
    path.write_text(text * 64, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = (
        {**CASES, "offloaded, activations too": OFFLOADED} if arguments.device == "cuda" else CASES
    )
    rows = rows_of(cases, arguments)
    worst = max(abs(r["planned / measured"] - 1) for r in rows)
    print(f"The plan is off by {worst:.1%} at most.")
    print(f"Wrote {write_rows('plan_peak', rows)}")


if __name__ == "__main__":
    main()
