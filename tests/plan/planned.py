"""Models and formats that are planned and made, two blocks each."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from tiny import quantization
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3MoeConfig,
)

from leanlift import quantize_experts
from leanlift.training import (
    LiftSFTConfig,
    RunArguments,
)

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
MODELS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES),
    "qwen2, tied": Qwen2Config(**SIZES, **GROUPED, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, **GROUPED),
    "gemma2": Gemma2Config(**SIZES, **GROUPED, head_dim=32),
    "phi3, fused": Phi3Config(**SIZES, **GROUPED),
    "qwen3, experts": Qwen3MoeConfig(
        **SIZES,
        **GROUPED,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=96,
        router_aux_loss_coef=0.0,
    ),
}
FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"bnb_4bit_use_double_quant": False},
    "nf4+double": {},
    "fp4": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
    "int8": {"load_in_8bit": True},
    "dense": {"load_in_4bit": False},
}
"""The settings under which a base is held so."""


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
