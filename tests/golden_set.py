"""Adapters, merges and plans as they were once written: what later code must read, write and plan.

    python tests/golden_set.py      writes tests/golden anew; do it only where a change is meant

The base is made of exact numbers, its masks are chosen by magnitude and its offsets are fractions
that bf16 holds, so that every machine makes the same files. What is stored:

* `golden/<case>/`: adapters of every format, and `first/`, which the code of format 1 has written;
* `golden/merges.json`: digests of the tensors of merges of them;
* `golden/plans.json`: plans of two tiny models in three formats, and the versions that they were
  made with: activations are torch's and transformers' affair.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from contextlib import chdir
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tiny import load, make_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, Qwen2Config

from leanlift import (
    LiftConfig,
    export_peft,
    get_lift_model,
    merge_adapter,
    plan_memory,
    save_adapter,
)
from leanlift.model import lift_layers
from leanlift.plan import Batch, PlanSettings

GOLDEN = Path(__file__).parent / "golden"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json", "leanlift.json")


@dataclass(frozen=True)
class Case:
    """An adapter: of which base, in which format, what it trains, what was done to it."""

    base: str
    kind: str
    config: dict[str, Any]
    refreshed: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def lift_config(self) -> LiftConfig:
        return LiftConfig.from_dict({"selector": "magnitude", **self.config})


CASES = {
    "nf4": Case("tied", "nf4", {"density": 0.02, "refresh_interval": 3}, refreshed=True),
    "int8": Case(
        "untied",
        "int8",
        {"rank_budget": 1, "values_dtype": "bfloat16", "quantize_embeddings": True},
    ),
    "dense": Case(
        "biased", "dense", {"target_modules": ["q_proj", "down_proj"], "retired_limit": None}
    ),
    "grown": Case(
        "untied", "nf4", {"target_modules": "attention"}, options={"embedding_rows": 140}
    ),
}
FORMER = {"first": "nf4"}
"""Written by former code, over the same base as one of the cases."""

MERGES = {
    "nf4, original": ("nf4", "tied", {"dtype": "float16"}),
    "nf4, quantized": ("nf4", "tied", {"dtype": "float32", "onto": "quantized"}),
    "int8, quantized": ("int8", "untied", {"dtype": "bfloat16", "onto": "quantized"}),
    "dense, original": ("dense", "biased", {"dtype": "bfloat16"}),
    "grown, original": ("grown", "untied", {"dtype": "float32"}),
    "first, original": ("first", "tied", {"dtype": "float16"}),
    "peft, original": ("peft", "tied", {"dtype": "float16"}),
}
BASES = {
    "tied": {"tied": True},
    "untied": {"tied": False},
    "biased": {"tied": True, "biased": True},
}

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
PLANNED = {
    "qwen2, tied": Qwen2Config(**SIZES, num_hidden_layers=3, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**SIZES, num_hidden_layers=2, head_dim=32, tie_word_embeddings=False),
}
FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "int8": {"load_in_8bit": True},
    "bf16": {"load_in_4bit": False},
}
PLANS = {f"{model}, {fmt}": (model, fmt) for model in PLANNED for fmt in FORMATS}


def make_base(name: str, path: Path) -> Path:
    """A checkpoint whose weights are small fractions, no two matrices the same."""
    make_checkpoint(path, **BASES[name])
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for number, parameter in enumerate(model.parameters()):
        parameter.data.copy_(fractions(parameter.numel(), 7919 + 2 * number).view_as(parameter))
    model.save_pretrained(path)
    return path


def fractions(count: int, factor: int) -> Tensor:
    """fp32 [count] of multiples of 1/1024 between -1/4 and 1/4, without a pattern to the eye."""
    place = torch.arange(count, dtype=torch.int64)
    return ((place * factor + place // 61) % 509 - 254).float() / 1024


def offsets_for(values: Tensor) -> Tensor:
    """Multiples of 1/512 that bf16 holds, [k]."""
    return ((torch.arange(values.numel()) * 37) % 113 - 56).to(values.dtype) / 512


def attached(case: Case, base: str = "base") -> Any:
    """The trained model of a case, over the base at a relative path."""
    config = case.lift_config()
    model = get_lift_model(load(Path(base), case.kind), config, progress=False, **case.options)
    for layer in lift_layers(model).values():
        layer.values.data.copy_(offsets_for(layer.values))
        if case.refreshed:
            layer.change_mask(next_mask(layer.index.to_flat()))
            layer.values.data.add_(offsets_for(layer.values) / 2)
    return model


def next_mask(flat: Tensor) -> Tensor:
    """A mask with other entries in the place of every eighth: the lowest that were not trained."""
    stay = torch.ones(flat.numel(), dtype=torch.bool)
    stay[::8] = False
    free = torch.ones(int(flat[-1]) + flat.numel() + 1, dtype=torch.bool)
    free[flat] = False
    fresh = free.nonzero().flatten()[: int((~stay).sum())]
    return torch.cat([flat[stay], fresh]).sort().values


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every tensor of a checkpoint: its dtype, shape and values. -0.0 is 0.0."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                head = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
                body = (tensor + 0).view(torch.uint8).numpy().tobytes()
                found[name] = hashlib.sha256(head + body).hexdigest()
    return found


def merged(adapter: Path, output: Path, base: Path, options: dict[str, Any]) -> dict[str, str]:
    merge_adapter(adapter, output, base=base, progress=False, **options)
    return digests(output)


def planned(name: str, directory: Path) -> dict[str, Any]:
    """A plan as JSON has it; the model's own name is the case's."""
    model, fmt = PLANS[name]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(PLANNED[model].to_dict()))
    config = LiftConfig(approx_rank=8, refresh_interval=4, quantize_embeddings=True)
    settings = PlanSettings(
        eval_strategy="steps", largest=Batch(2, 48), largest_eval=Batch(1, 48), cuda=True,
        **FORMATS[fmt],
    )  # fmt: skip
    plan = plan_memory(directory, config, settings)
    facts: dict[str, Any] = json.loads(json.dumps(plan.to_dict()))
    return {**facts, "model": name}


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers")}


def write() -> None:
    """Write the golden set."""
    with tempfile.TemporaryDirectory() as place, chdir(place):
        for name in BASES:
            make_base(name, Path(name))
        for name, case in CASES.items():
            save_adapter(attached(case, case.base), GOLDEN / name)
        export_peft(GOLDEN / "nf4", Path("peft"), progress=False)
        (GOLDEN / "peft").mkdir(exist_ok=True)
        for file in ADAPTER_FILES:
            (GOLDEN / "peft" / file).write_bytes((Path("peft") / file).read_bytes())
        merges = {
            name: merged(GOLDEN / adapter, Path(f"merged {i}"), Path(base), options)
            for i, (name, (adapter, base, options)) in enumerate(MERGES.items())
        }
        plans = {name: planned(name, Path(f"plan {i}")) for i, name in enumerate(PLANS)}
    for name, facts in ("merges", merges), ("plans", {"versions": versions(), "plans": plans}):
        (GOLDEN / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    write()
