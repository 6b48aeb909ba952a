"""A base whose embedding has more rows than it was stored with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny import make_checkpoint, make_tokenizer
from transformers import PhiConfig, PhiForCausalLM

from leanlift import (
    LiftConfig,
    get_lift_model,
)
from leanlift.model import lift_layers

HAVE = len(make_tokenizer())
TOKENS = ["<|im_start|>", "<|im_end|>", "<x>"]
ROWS = HAVE + len(TOKENS)
LIFT = LiftConfig(approx_rank=4, refresh_interval=0)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<x>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<x>{% endif %}"
)


def make_tokens() -> Any:
    """The base's tokenizer with more tokens, one of which ends a text."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", TEMPLATE
    return tokenizer


def make_biased(path: Path) -> Path:
    """A model whose untied head has a bias."""
    config = PhiConfig(
        vocab_size=HAVE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=False,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = PhiForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def grown(stock: Any, lift: LiftConfig = LIFT, rows: int = ROWS, seed: int = 1) -> Any:
    """Attached to, with random offsets."""
    model = get_lift_model(stock, lift, progress=False, embedding_rows=rows)
    torch.manual_seed(seed)
    for layer in lift_layers(model).values():
        layer.values.data.normal_(std=0.05)
    return model.eval()


@torch.no_grad()
def logits(model: Any, rows: int = ROWS) -> torch.Tensor:
    return model(torch.arange(rows - 40, rows).reshape(2, 20)).logits.float()


def edit(adapter: Path, **changes: Any) -> Path:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return adapter


# --- live, saved, merged, loaded -----------------------------------------------------------

ENDS = {
    "tied": {"tied": True},
    "untied": {"tied": False},
    "biased": None,
}


def make_any(path: Path, ends: str, dtype: torch.dtype = torch.float32) -> Path:
    options = ENDS[ends]
    return make_biased(path) if options is None else make_checkpoint(path, **options, dtype=dtype)


CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"say {i}"},
            {"role": "assistant", "content": str(i)},
        ]
    }
    for i in range(8)
]
