"""One list of the model families that leanlift is held to, each as a tiny model's config.

One that is added here is attached to and planned in every format.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen2, tied": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
    "mistral": (MistralConfig, {"sliding_window": 16}),
    "phi3, fused": (Phi3Config, {}),
    "gemma2": (Gemma2Config, {"head_dim": 32}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 32, "sliding_window": 16}),
    "gpt2, turned": (GPT2Config, {"n_inner": 192, "tie_word_embeddings": True}),
    "qwen3, experts": (
        Qwen3MoeConfig,
        {
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "router_aux_loss_coef": 0.0,
        },
    ),
    "gpt-oss, experts": (
        GptOssConfig,
        {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    ),
}
"""Name -> its config, and what it has beside `SIZES`."""


def config_of(family: str, **changes: Any) -> Any:
    """A family's config: 2 blocks, 64 wide, unless `changes` say otherwise."""
    kind, own = FAMILIES[family]
    return kind(**{**SIZES, **own, **changes})
