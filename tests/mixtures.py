"""Tiny models with experts, of families that keep and store them in different ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import load, make_tokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GraniteMoeConfig,
    Llama4TextConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

from leanlift import LiftConfig, get_lift_model
from leanlift.layers import LiftExperts
from leanlift.model import lift_layers
from leanlift.model.stacks import named_parts

EXPERTS = 11
CONFIG = LiftConfig(density=0.1, approx_rank=8)
SIZES: dict[str, Any] = {
    "vocab_size": len(make_tokenizer()),
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "use_cache": False,
}
MIXTURES: dict[str, Any] = {
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=EXPERTS, moe_intermediate_size=40),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=EXPERTS),
    "gpt_oss": GptOssConfig(**SIZES, num_local_experts=EXPERTS, sliding_window=16),
    "granitemoe": GraniteMoeConfig(**SIZES, num_local_experts=EXPERTS),
    "llama4": Llama4TextConfig(
        **{**SIZES, "num_experts_per_tok": 1},
        num_local_experts=EXPERTS,
        intermediate_size_mlp=48,
        attention_chunk_size=32,
    ),
}
"""Qwen and Mixtral store each expert's matrices apart; GPT-OSS and Llama 4 theirs transposed, as
they compute; Granite a stack under another name; Llama 4 sends every token to all experts."""


def make_mixture(config: Any, place: Path) -> Path:
    """Random weights in 32 bits, no two tensors alike."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(place)
    make_tokenizer().save_pretrained(place)
    return place


def make_mxfp4(place: Path, experts: int = EXPERTS) -> Path:
    """A GPT-OSS as it is published, its experts in MXFP4: random codes, scales about 2^-7."""
    sizes = {**SIZES, "intermediate_size": 96, "num_local_experts": experts}
    make_mixture(GptOssConfig(**sizes, sliding_window=16), place)
    tensors, generator = load_file(place / "model.safetensors"), torch.Generator().manual_seed(5)
    for name in [name for name, tensor in tensors.items() if tensor.dim() == 3]:
        _, m, n = tensors.pop(name).shape
        for part, shape, low, high in (
            ("blocks", (experts, n, m // 32, 16), 0, 256),
            ("scales", (experts, n, m // 32), 116, 123),
        ):
            codes = torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)
            tensors[f"{name}_{part}"] = codes
    save_file({n: t.bfloat16() if t.is_floating_point() else t for n, t in tensors.items()},
              place / "model.safetensors", {"format": "pt"})  # fmt: skip
    config = json.loads((place / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head", "model.embed_tokens"],
    }
    (place / "config.json").write_text(json.dumps(config))
    return place


def batch(rows: int = 2, seed: int = 1) -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (rows, 16), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(input_ids=batch()["input_ids"]).logits
    return out


def move(model: nn.Module, size: float = 0.02) -> None:
    """Offsets as training could have left them."""
    generator = torch.Generator().manual_seed(3)
    for layer in lift_layers(model).values():
        layer.values.data.copy_(size * torch.randn(layer.values.shape, generator=generator))


def dense_twin(model: nn.Module, stock: Any) -> dict[str, nn.Module]:
    """Give a stock model the attached one's effective weights; its parts, by name."""
    parts = named_parts(stock)
    for name, layer in lift_layers(model).items():
        weight: Any = parts[name].weight
        weight.data.copy_(layer.effective.rows(0, layer.weight_tiles.shape[0]).view_as(weight))
    return parts


def attached(base: Path, kind: str = "dense", config: LiftConfig = CONFIG, **more: Any) -> Any:
    return get_lift_model(load(base, kind), config, progress=False, **more)


def experts_of(model: nn.Module) -> dict[str, LiftExperts]:
    return {n: m for n, m in lift_layers(model).items() if isinstance(m, LiftExperts)}
