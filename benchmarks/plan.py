"""What `plan_memory` says of nine models at 1 × 2048 tokens, in five settings.

    python -m benchmarks.plan [--models Llama-2-7B ...]

Nothing is downloaded: the shapes are facts of the models' public config.json files. NF4 with
double quantization, 5 % of every Linear (of the 70B model's 1 %), activation checkpointing,
`sparse_adamw_8bit`, bf16 values, the tiled loss. default: that. int8_embeddings: also INT8
embedding and head, and updates in the backward pass. offloaded: also activation offloading, and the
embedding on the CPU where it is not tied. streamed: also the frozen blocks in the host's memory
("host GiB"). streamed_state: also what is learned in them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from benchmarks.common import write_rows
from leanlift import LiftConfig, PlanSettings, UserError, plan_memory
from leanlift.measure import CATEGORIES

GIB = 2**30


def shape(
    vocabulary: int, width: int, mlp: int, layers: int, heads: int, kv: int, **more: Any
) -> dict[str, Any]:
    """The facts of a config.json that decide memory."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        **more,
    }


MODELS: dict[str, Any] = {
    "Llama-2-7B": LlamaConfig(**shape(32000, 4096, 11008, 32, 32, 32)),
    "Llama-2-13B": LlamaConfig(**shape(32000, 5120, 13824, 40, 40, 40)),
    "Llama-3-8B": LlamaConfig(**shape(128256, 4096, 14336, 32, 32, 8)),
    "Qwen2.5-7B": Qwen2Config(**shape(152064, 3584, 18944, 28, 28, 4)),
    "Qwen3-8B": Qwen3Config(**shape(151936, 4096, 12288, 36, 32, 8, head_dim=128)),
    "Mistral-7B": MistralConfig(**shape(32000, 4096, 14336, 32, 32, 8)),
    "Gemma-2-9B": Gemma2Config(
        **{**shape(256000, 3584, 14336, 42, 16, 8, head_dim=256), "tie_word_embeddings": True}
    ),
    "Phi-3-mini": Phi3Config(**shape(32064, 3072, 8192, 32, 32, 32)),
    "Llama-3-70B": LlamaConfig(**shape(128256, 8192, 28672, 80, 64, 8)),
}
DENSITIES = {"Llama-3-70B": 0.01}
STEP: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "max_length": 2048,
    "optim": "sparse_adamw_8bit",
    "cuda": True,
}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "int8_embeddings": ({"quantize_embeddings": True}, {"optim_in_backward": True}),
    "offloaded": (
        {"quantize_embeddings": True},
        {"optim_in_backward": True, "activation_offloading": True, "embedding_on_cpu": True},
    ),
}
SETTINGS["streamed"] = (SETTINGS["offloaded"][0], {**SETTINGS["offloaded"][1], "stream_base": True})
SETTINGS["streamed_state"] = (
    SETTINGS["streamed"][0],
    {**SETTINGS["streamed"][1], "stream_state": True},
)


def row(name: str, setting: str, directory: Path) -> dict[str, Any]:
    """One model in one setting."""
    path = directory / name / "config.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(MODELS[name].to_dict()), encoding="utf-8")
    AutoConfig.from_pretrained(path)
    lift, step = SETTINGS[setting]
    density = DENSITIES.get(name, 0.05)
    config = LiftConfig(density=density, values_dtype="bfloat16", **lift)
    started = time.perf_counter()
    try:
        plan = plan_memory(path, config, PlanSettings(**STEP, **step))
    except UserError:  # a tied embedding cannot be on the CPU
        settings = PlanSettings(**STEP, **{**step, "embedding_on_cpu": False})
        plan = plan_memory(path, config, settings)
    return {
        "model": name,
        "setting": setting,
        "density": density,
        "entries": plan.entries,
        "peak GiB": round(plan.peak / GIB, 3),
        "peak phase": plan.peak_phase,
        **{f"{key} GiB": round(plan.categories.get(key, 0) / GIB, 3) for key in CATEGORIES},
        **{f"phase {key} GiB": round(nbytes / GIB, 3) for key, nbytes in plan.phases.items()},
        "host GiB": round(plan.host / GIB, 3),
        "smallest card GB": next((c for c in (4, 6, 8, 12, 16, 24, 48) if plan.fits(c)), ""),
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for name in arguments.models:
            for setting in SETTINGS:
                rows.append(row(name, setting, Path(directory)))
                print(rows[-1], flush=True)
    if list(arguments.models) == list(MODELS):
        print(f"Wrote {write_rows('plan', rows)}")


if __name__ == "__main__":
    main()
