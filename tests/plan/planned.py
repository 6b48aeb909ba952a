"""Models that are planned and made, two blocks each, and what a run of one is told."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from families import config_of
from tiny import quantization
from transformers import AutoModelForCausalLM

from leanlift import quantize_experts
from leanlift.training import (
    LiftSFTConfig,
    RunArguments,
)

WIDE: dict[str, Any] = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 320}
MODELS: dict[str, Any] = {
    "llama": config_of("llama", **WIDE, num_key_value_heads=4),
    "qwen2, tied": config_of("qwen2, tied", **WIDE),
    "mistral": config_of("mistral", **WIDE),
    "gemma2": config_of("gemma2", **WIDE),
    "phi3, fused": config_of("phi3, fused", **WIDE),
    "gpt2, turned": config_of("gpt2, turned", **WIDE),
    "qwen3, experts": config_of("qwen3, experts", **WIDE),
}


def arguments(path: Path, **changes: Any) -> tuple[RunArguments, LiftSFTConfig]:
    loop = {f.name for f in dataclasses.fields(LiftSFTConfig)}
    sft = {key: value for key, value in changes.items() if key in loop}
    run_args = {key: value for key, value in changes.items() if key not in loop}
    return (
        RunArguments(model_name_or_path=str(path), dataset_name="rows.json", **run_args),
        LiftSFTConfig(
            **{"output_dir": "x", "use_cpu": True, "bf16": False, "max_length": 64,
               "per_device_train_batch_size": 4, **sft},
        ),
    )  # fmt: skip


def load_base(path: Path, kind: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=quantization(kind), dtype=torch.float32
    )
    return quantize_experts(model)
