"""The base: a small Llama, pretrained on a domain's source and kept on disk as a checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    get_cosine_schedule_with_warmup,
)

from benchmarks.quality.domain import PAD, Domain
from benchmarks.quality.score import score
from leanlift.io.tensors import new_directory, write_json


@dataclass(frozen=True)
class Size:
    """Of the base, and how long it is pretrained. Widths are multiples of 64, NF4's block."""

    hidden: int = 128
    intermediate: int = 384
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    steps: int = 1500
    lr: float = 2e-3


def pretrained(domain: Domain, size: Size, cache: Path, device: torch.device) -> Path:
    """The directory of the base: found in `cache`, or pretrained now and put there."""
    facts = {"domain": domain.name, **asdict(size)}
    directory = cache / "-".join(str(value) for value in facts.values())
    if not (directory / "model.safetensors").is_file():
        torch.manual_seed(0)
        model = _build(domain, size).to(device)
        _train(model, domain, size, device)
        with new_directory(directory) as temporary:
            model.half().save_pretrained(temporary)
            known = {name: score(model.float(), rows) for name, rows in domain.source.items()}
            write_json(temporary / "known.json", {n: asdict(s) for n, s in known.items()})
    return directory


def known(directory: Path) -> dict[str, dict[str, float]]:
    """What the base knew right after pretraining, by source skill."""
    return json.loads((directory / "known.json").read_text())


def load(directory: Path, kind: str, device: torch.device) -> Any:
    """The base by stock transformers: "dense" (32 bits), "int8" or "nf4" (double quantization)."""
    quantization = {
        "dense": None,
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
    }[kind]
    return AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        quantization_config=quantization,
        device_map={"": device.index or 0} if device.type == "cuda" else None,
    )


def _build(domain: Domain, size: Size) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=domain.vocabulary,
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=domain.end,
        )
    )


def _train(model: Any, domain: Domain, size: Size, device: torch.device) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), size.lr, (0.9, 0.98), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, size.steps // 20, size.steps)
    batches = domain.pretraining(0)
    model.train()
    for _ in tqdm(range(size.steps), desc=f"pretraining on {domain.name}", mininterval=10):
        batch = {key: tensor.to(device) for key, tensor in next(batches).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
