"""A tiny Llama or Qwen2 made on disk, as an ordinary 16-bit checkpoint with its tokenizer."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from families import config_of
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable character, plus pad, end and unknown."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def make_checkpoint(
    path: Path,
    *,
    tied: bool = True,
    biased: bool = False,
    dtype: torch.dtype = torch.float32,
    hidden: int = 64,
    intermediate: int = 192,
    max_shard_size: str = "5GB",
) -> Path:
    """Random weights: 2 blocks, 4 heads, 2 key-value heads. `biased` makes it a Qwen2."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = config_of(
        "qwen2, tied" if biased else "llama",
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        tie_word_embeddings=tied,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms and biases that differ from their trivial start
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        assert name
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(path)
    return path


def make_checkpoint_of(config: PretrainedConfig, path: Path) -> Path:
    """Random weights of any family in 32 bits, with the same tokenizer."""
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


FORMATS: dict[str, dict[str, Any]] = {
    "nf4+double": {},
    "nf4": {"bnb_4bit_use_double_quant": False},
    "fp4": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
    "int8": {"load_in_8bit": True},
    "dense": {"load_in_4bit": False},
}
"""Ways to hold a base, and the settings of a run or a plan that hold it so."""


def quantization(kind: str, dtype: torch.dtype = torch.float32) -> BitsAndBytesConfig | None:
    """One of `FORMATS`, as transformers is told."""
    if kind == "dense":
        return None
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind[:3],
        bnb_4bit_use_double_quant=kind.endswith("+double"),
        bnb_4bit_compute_dtype=dtype,
    )


def load(path: Path, kind: str = "nf4+double", dtype: torch.dtype = torch.float32):
    """Load a checkpoint with stock transformers."""
    return AutoModelForCausalLM.from_pretrained(
        path, quantization_config=quantization(kind, dtype), dtype=dtype
    )
