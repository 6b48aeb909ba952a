"""The plan against the real thing: bytes of tensors, and the peak of a real training step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import make_tokenizer, quantization
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
)

from leanlift import LiftConfig, LiftTrainer, get_lift_model
from leanlift.memory import MemoryMeter, StepSettings, static_categories
from leanlift.model import embedding_to_cpu
from leanlift.optim import state_nbytes
from leanlift.quantized import WeightFormat
from leanlift.training import LiftSFTConfig, MemoryCallback, plan_memory

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
}
FORMATS: dict[str, WeightFormat | None] = {
    "nf4": WeightFormat("nf4", "float32", 64),
    "nf4+double": WeightFormat("nf4", "float32", 64, True),
    "fp4": WeightFormat("fp4", "float32", 64),
    "int8": WeightFormat("int8", "float32"),
    "dense": None,
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = {}
    for name, config in MODELS.items():
        path = paths[name] = tmp_path_factory.mktemp("model")
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
        make_tokenizer().save_pretrained(path)
    return paths


def load(path: Path, kind: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        path, quantization_config=quantization(kind), dtype=torch.float32
    )


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ends", [False, True], ids=["", "int8-ends"])
def test_every_static_category_is_the_bytes_of_the_tensors(
    checkpoints: dict[str, Path], name: str, kind: str, ends: bool
) -> None:
    config = LiftConfig(density=0.05, approx_rank=8, quantize_ends=ends)
    model = get_lift_model(load(checkpoints[name], kind), config, progress=False)
    planned = plan_memory(
        checkpoints[name],
        config,
        StepSettings(length=16, dtype="float32", cuda=False),
        FORMATS[kind],
    ).categories
    real = static_categories(model)
    for category in ("base weights", "embeddings and head", "norms and other", "index", "values"):
        assert planned[category] == real[category], category


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch 4": {"per_device_train_batch_size": 4},
    "length 64": {"max_length": 64},
    "length 256": {"max_length": 256},
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointing, batch 4": {"gradient_checkpointing": True, "per_device_train_batch_size": 4},
    "accumulation": {"gradient_accumulation_steps": 2},
    "adamw_torch": {"optim": "adamw_torch"},
    "8 bit": {"optim": "sparse_adamw_8bit"},
    "in backward": {"optim": "sparse_adamw", "optim_in_backward": True, "max_grad_norm": 0.0},
    "in backward, checkpointing": {
        "optim": "sparse_adamw_8bit",
        "optim_in_backward": True,
        "max_grad_norm": 0.0,
        "gradient_checkpointing": True,
    },
    "bf16 values": {"optim": "sparse_adamw_8bit", "values_dtype": "bfloat16"},
    "bf16": {"dtype": "bfloat16"},
    "int8 ends": {"quantize_ends": True},
    "embedding on the cpu": {"quantize_ends": True, "embedding_on_cpu": True},
    "tied": {"model": "qwen2, tied"},
    "gemma2": {"model": "gemma2"},
}


@pytest.mark.parametrize("case", CASES)
def test_the_planned_peak_is_the_measured_one_within_5_percent(
    checkpoints: dict[str, Path], tmp_path: Path, case: str
) -> None:
    changes = dict(CASES[case])
    path = checkpoints[changes.pop("model", "llama")]
    dtype = changes.pop("dtype", "float32")
    on_cpu = changes.pop("embedding_on_cpu", False)
    lift = {k: changes.pop(k) for k in ("values_dtype", "quantize_ends") if k in changes}
    config = LiftConfig(density=0.05, approx_rank=8, **lift)
    options = {
        "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "max_steps": 3,
        "per_device_train_batch_size": 2, "max_length": 128, "gradient_checkpointing": False,
        "save_strategy": "no", "optim": "sparse_adamw", "disable_tqdm": True, **changes,
    }  # fmt: skip
    sft = LiftSFTConfig(**options)
    fmt = WeightFormat("nf4", dtype, 64, True)
    settings = StepSettings(
        batch=sft.per_device_train_batch_size,
        length=sft.max_length,
        dtype=dtype,
        checkpointing=sft.gradient_checkpointing,
        accumulate=sft.gradient_accumulation_steps,
        optim=sft.optim,
        in_backward=sft.optim_in_backward,
        embedding_on_cpu=on_cpu,
        cuda=False,
    )
    plan = plan_memory(path, config, settings, fmt)

    base = AutoModelForCausalLM.from_pretrained(
        path,
        quantization_config=quantization("nf4+double", getattr(torch, dtype)),
        dtype=getattr(torch, dtype),
    )
    model = get_lift_model(base, config, progress=False)
    if on_cpu:
        embedding_to_cpu(model)
    meter = MemoryMeter(torch.device("cpu"))
    memory = MemoryCallback(meter)
    trainer = LiftTrainer(
        model=model,
        args=sft,
        train_dataset=Dataset.from_list([{"text": "0123456789 is " * 40}] * 16),
        processing_class=make_tokenizer(),
        callbacks=[memory],
    )
    trainer.train()
    assert memory.peak is not None
    measured, planned = meter.report.categories, plan.categories
    if not on_cpu:
        assert planned["embeddings and head"] == measured["embeddings and head"]
    assert planned["optimizer state"] == state_nbytes(trainer.optimizer)
    assert planned["scratch"] == measured["scratch"]
    print(case, plan.phases["train"], memory.peak, plan.phases["train"] / memory.peak)
    assert abs(plan.phases["train"] / memory.peak - 1) <= 0.05, (planned, measured)
