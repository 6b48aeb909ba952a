"""The plan against the real thing: bytes of tensors, and the peak of a real training step."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from families import config_of
from planned import MODELS, arguments, load_base
from sweeps import swept
from tiny import FORMATS, make_tokenizer, quantization
from transformers import AutoModelForCausalLM

from leanlift import (
    LiftConfig,
    LiftTrainer,
    PlanSettings,
    get_lift_model,
    plan_memory,
    quantize_experts,
)
from leanlift.cli import main
from leanlift.measure import LiveBytes, MemoryMeter, static_categories
from leanlift.model import embedding_to_cpu
from leanlift.optim import state_nbytes
from leanlift.plan import Batch, Planned
from leanlift.plan.loss import loss_of_all_tokens
from leanlift.plan.planner import plan_step
from leanlift.training import (
    LiftSFTConfig,
    MemoryCallback,
    plan_of,
)
from leanlift.training.fit import (
    fit,
)
from leanlift.weights.quantized import Weight4bit, Weight8bit, requantize

COMBINATIONS = list(itertools.product(MODELS, FORMATS, (False, True)))
SIMPLE = [("llama", kind, False) for kind in ("fp4", "int8", "dense")]
SIMPLE += [(name, "nf4+double", True) for name in ("phi3, fused", "qwen3, experts")]


@pytest.mark.parametrize(("name", "kind", "ends"), swept(COMBINATIONS, *SIMPLE))
def test_every_static_category_is_the_bytes_of_the_tensors(
    checkpoints: dict[str, Path], name: str, kind: str, ends: bool
) -> None:
    config = LiftConfig(density=0.05, approx_rank=8, quantize_embeddings=ends)
    model = get_lift_model(load_base(checkpoints[name], kind), config, progress=False)
    planned = plan_memory(
        checkpoints[name],
        config,
        PlanSettings(max_length=16, cuda=False, **FORMATS[kind]),
    ).categories
    real = static_categories(model)
    for category in ("base weights", "embeddings and head", "norms and other", "index", "values"):
        assert planned[category] == real[category], category


@pytest.mark.parametrize("kind", swept(["dense", "int8", "nf4+double"], "nf4+double"))
@pytest.mark.parametrize("modules", ["attention", "mlp", ("q_proj", "down_proj")], ids=str)
def test_what_is_not_trained_is_held_all_the_same(
    checkpoints: dict[str, Path], kind: str, modules: Any
) -> None:
    config = LiftConfig(approx_rank=8, target_modules=modules)
    model = get_lift_model(load_base(checkpoints["llama"], kind), config, progress=False)
    settings = PlanSettings(max_length=16, cuda=False, **FORMATS[kind])
    planned = plan_memory(checkpoints["llama"], config, settings).categories
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
    "int8 ends": {"quantize_embeddings": True},
    "embedding on the cpu": {"quantize_embeddings": True, "embedding_on_cpu": True},
    "tied": {"model": "qwen2, tied"},
    "gemma2": {"model": "gemma2"},
    "experts": {"model": "qwen3, experts"},
    "experts, checkpointing": {"model": "qwen3, experts", "gradient_checkpointing": True},
    "experts, bf16": {"model": "qwen3, experts", "dtype": "bfloat16"},
    "a third of the entries": {"density": 0.3, "gradient_checkpointing": True},
    "a third of the experts": {"density": 0.3, "model": "qwen3, experts"},
    "attention with dropout": {"model": "gpt2, turned"},
}


USUAL = ("bf16 values", "experts", "a third of the entries", "attention with dropout")


@pytest.mark.parametrize("case", swept(CASES, *USUAL))
def test_the_planned_peak_is_the_measured_one_within_5_percent(
    checkpoints: dict[str, Path], tmp_path: Path, case: str
) -> None:
    changes = dict(CASES[case])
    path = checkpoints[changes.pop("model", "llama")]
    dtype = changes.pop("dtype", "float32")
    on_cpu = changes.pop("embedding_on_cpu", False)
    lift = {k: changes.pop(k) for k in ("values_dtype", "quantize_embeddings") if k in changes}
    config = LiftConfig(density=changes.pop("density", 0.05), approx_rank=8, **lift)
    options = {
        "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "max_steps": 3,
        "per_device_train_batch_size": 2, "max_length": 128, "gradient_checkpointing": False,
        "save_strategy": "no", "optim": "sparse_adamw", "disable_tqdm": True, **changes,
    }  # fmt: skip
    sft = LiftSFTConfig(**options)
    settings = PlanSettings(
        per_device_train_batch_size=sft.per_device_train_batch_size,
        max_length=sft.max_length,
        dtype=dtype,
        gradient_checkpointing=sft.gradient_checkpointing,
        gradient_accumulation_steps=sft.gradient_accumulation_steps,
        optim=sft.optim,
        optim_in_backward=sft.optim_in_backward,
        embedding_on_cpu=on_cpu,
        cuda=False,
        largest=Batch(sft.per_device_train_batch_size, sft.max_length),
    )
    plan = plan_memory(path, config, settings)

    base = AutoModelForCausalLM.from_pretrained(
        path,
        quantization_config=quantization("nf4+double", getattr(torch, dtype)),
        dtype=getattr(torch, dtype),
    )
    model = get_lift_model(quantize_experts(base), config, progress=False)
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
    assert planned["embeddings and head"] == measured["embeddings and head"]
    assert planned["optimizer state"] == state_nbytes(trainer.optimizer)
    assert planned["scratch"] == measured["scratch"]
    assert abs(plan.phases["train"] / memory.peak - 1) <= 0.05, (planned, measured)


@pytest.mark.parametrize("batch", [2, 8])
def test_an_evaluation_needs_what_was_planned(
    checkpoints: dict[str, Path], tmp_path: Path, batch: int
) -> None:
    rows = Dataset.from_list([{"text": "0123456789 is " * 40}] * 16)
    args, sft = arguments(
        checkpoints["llama"], approx_rank=8, eval_strategy="steps", eval_steps=1, max_length=128,
        per_device_eval_batch_size=batch, load_in_4bit=False, gradient_checkpointing=False,
        disable_tqdm=True, output_dir=str(tmp_path),
    )  # fmt: skip
    plan = plan_of(args, sft, cuda=False)
    model = get_lift_model(
        load_base(checkpoints["llama"], "dense"), args.lift_config(), progress=False
    )
    trainer = LiftTrainer(
        model=model, args=sft, train_dataset=rows, eval_dataset=rows,
        processing_class=make_tokenizer(),
    )  # fmt: skip
    trainer.evaluate()  # what is made once, such as the scratch
    with LiveBytes() as live:
        trainer.evaluate()
    static = sum(plan.categories.values()) - plan.categories["activations and workspace"]
    static -= plan.categories["gradients"]
    assert live.peak == pytest.approx(plan.phases["evaluate"] - static, rel=0.05)


@pytest.mark.thorough
def test_evaluation_in_large_batches_is_what_is_made_smaller_first(
    checkpoints: dict[str, Path],
) -> None:
    args, sft = arguments(
        checkpoints["llama"], approx_rank=8, eval_strategy="steps", eval_steps=1,
        per_device_eval_batch_size=512, per_device_train_batch_size=1,
    )  # fmt: skip
    plan = plan_of(args, sft, cuda=False)
    assert plan.peak_phase == "evaluate"
    found = fit(args, sft, 0.9 * plan.needed / 2**30, cuda=False)
    assert found.steps[0].startswith("per_device_eval_batch_size=256")
    assert found.sft.per_device_eval_batch_size < 512
    assert "evaluate" not in plan_of(*arguments(checkpoints["llama"]), cuda=False).phases


@pytest.mark.parametrize("kind", swept(["nf4", "fp4", "nf4+double", "int8"], "fp4", "int8"))
def test_a_base_that_is_quantized_on_disk_is_planned_as_it_is(
    checkpoints: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    load_base(checkpoints["llama"], kind).save_pretrained(tmp_path)
    args, sft = arguments(tmp_path, approx_rank=8, load_in_4bit=False)
    planned = plan_of(args, sft, cuda=False).categories["base weights"]
    model = get_lift_model(load_base(checkpoints["llama"], kind), LiftConfig(approx_rank=8), False)
    assert planned == static_categories(model)["base weights"]


def test_the_command_prints_table_json_and_picture(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.json"
    shutil.copy(checkpoints["llama"] / "config.json", config)
    argv = ["plan", "--model_name_or_path", str(config), "--max_length", "32", "--cpu"]
    assert main(argv) == 0
    table = capsys.readouterr().out
    assert "peak of tensors" in table
    assert "GB card" not in table, "the run is on a CPU"
    picture = tmp_path / "plan.png"
    assert main([*argv, "--json", "--fit", "1GB", "--plot", str(picture)]) == 0
    data = json.loads(capsys.readouterr().out)
    assert sum(data["categories"].values()) == data["phases"]["train"]
    assert data["changed"] == []
    parts = data["step"]
    assert 0 < parts["kept for the backward pass"] <= parts["loss"]
    assert max(parts["loss"], parts["backward pass"], parts["optimizer's step"]) == (
        data["categories"]["gradients"] + data["categories"]["activations and workspace"]
    )
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert main(["plan", "--model_name_or_path", str(tmp_path / "nothing")]) == 2
    assert "cannot be planned for" in capsys.readouterr().err
    assert main([*argv, "--optim", "sgd"]) == 2
    assert "optim=sgd cannot be planned" in capsys.readouterr().err


@pytest.mark.usefixtures("drawn")
def test_a_run_reports_plan_against_measured(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "%s"}\n' % ("0123456789" * 10) * 8)
    argv = [
        "train", "--model_name_or_path", str(checkpoints["llama"]), "--dataset_name", str(rows),
        "--output_dir", str(tmp_path / "run"), "--approx_rank", "8", "--max_steps", "3",
        "--per_device_train_batch_size", "2", "--max_length", "64", "--fit", "1GB",
    ]  # fmt: skip
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "planned at the peak" in printed
    assert main(["report", str(tmp_path / "run")]) == 0
    report = capsys.readouterr().out
    (line,) = [line for line in report.splitlines() if re.match("peak +[0-9]", line)]
    assert abs(float(line.split()[-2])) <= 5
    assert "planned" in (tmp_path / "run" / "memory.md").read_text()
    assert (tmp_path / "run" / "memory.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["nf4+double", "int8"])
def test_one_layer_of_full_width_has_the_planned_bytes(kind: str) -> None:
    """4096 x 11008 and its kin, without a checkpoint: our layers over quantized random weights."""
    sizes = {"vocab_size": 512, "hidden_size": 4096, "intermediate_size": 11008}
    wide = config_of("llama", **sizes, num_hidden_layers=1, num_key_value_heads=4)
    fmt = PlanSettings(cuda=False, **FORMATS[kind]).requested_format
    config = LiftConfig(density=0.05, selector="magnitude", quantize_embeddings=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(wide, dtype=torch.float32)
    model.to_empty(device="cpu")
    for name, module in list(model.named_modules()):
        if name.endswith("_proj"):
            tiles = requantize(torch.randn(module.weight.shape), fmt, torch.device("cpu"))
            assert isinstance(tiles, (Weight4bit, Weight8bit))
            model.set_submodule(name, tiles.module)
    for parameter in model.parameters():
        if parameter.dtype.is_floating_point:
            parameter.data.normal_()
    get_lift_model(model, config, progress=False)

    def build() -> Any:
        return AutoModelForCausalLM.from_config(wide, dtype=torch.float32)

    settings = PlanSettings(max_length=16, cuda=False)
    planned = Planned(build, config, fmt, settings)
    planned_bytes = plan_step(planned, "wide", loss_of_all_tokens).categories
    real = static_categories(model)
    for category in ("base weights", "embeddings and head", "norms and other", "index", "values"):
        assert planned_bytes[category] == real[category], category
