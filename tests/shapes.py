"""config.json files of 7B-class models: facts of their public configurations, no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, Qwen2Config

COMMON: dict[str, Any] = {"max_position_embeddings": 4096, "tie_word_embeddings": False}
LLAMA_3_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, **COMMON,
)  # fmt: skip
QWEN_2_5_7B = Qwen2Config(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
    num_attention_heads=28, num_key_value_heads=4, **COMMON,
)  # fmt: skip

SMALL = LlamaConfig(
    vocab_size=50000, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, **COMMON,
)  # fmt: skip


def write_config(config: Any, directory: Path) -> Path:
    """Its config.json in a directory; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    return directory
