"""Blocks that are not recomputed: which ones, the same step to the bit, and the memory planned."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from families import config_of
from planned import arguments
from sweeps import swept
from tiny import make_checkpoint_of, make_tokenizer, quantization
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from leanlift import LiftCallback, LiftConfig, LiftTrainer, UserError, get_lift_model
from leanlift.layers import LiftLinear
from leanlift.measure import LiveBytes, MemoryMeter
from leanlift.model.kept_blocks import keep_last_blocks, recomputed_blocks
from leanlift.plan import Batch, blocks
from leanlift.plan.base import without_packing_search
from leanlift.plan.fake import StepBytes, attach_fake, fake_tensors, step_peak
from leanlift.plan.loss import loss_of_all_tokens
from leanlift.plan.pieces import first_pieces
from leanlift.training import LiftSFTConfig, MemoryCallback, plan_of
from leanlift.training.batches import Batches
from leanlift.training.plan import check_memory_settings
from leanlift.weights.quantized import WeightFormat

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

FAMILIES: dict[str, tuple[Any, int, int]] = {
    "llama": (config_of("llama", num_hidden_layers=13), 6, 8),
    "qwen2, tied": (config_of("qwen2, tied", num_hidden_layers=10), 2, 6),
    "phi3, fused": (config_of("phi3, fused", num_hidden_layers=11), 5, 8),
    "gemma2": (config_of("gemma2", num_hidden_layers=19), 9, 13),
    "gpt2, turned": (config_of("gpt2, turned", num_hidden_layers=12), 6, 8),
    "qwen3, experts": (config_of("qwen3, experts", num_hidden_layers=11), 5, 8),
    "all kept": (config_of("llama", num_hidden_layers=6), 6, 4),
}
"""A model, how many of its blocks are kept, and how many are run."""


def step(config: Any, kept: int, whole: bool, reuse: bool = False, **options: Any) -> StepBytes:
    fmt, workspace = WeightFormat("nf4", "float32", 64, True), first_pieces("cuda")
    workspace.reuses_weights = reuse
    with without_packing_search(), fake_tensors():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        attach_fake(model, LiftConfig(approx_rank=8), fmt, workspace=workspace)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        keep_last_blocks(model, kept, options.get("offload", False))
        given = {"in_backward": False, "accumulate": False, **options}
        return step_peak(model.train(), loss_of_all_tokens, 1, 32, whole=whole, **given)


@pytest.mark.parametrize(
    "options",
    swept(
        [{}, {"offload": True}, {"in_backward": True}, {"accumulate": True}, {"reuse": True}],
        {},
        {"reuse": True},
    ),
    ids=str,
)
@pytest.mark.parametrize("family", swept(FAMILIES, "gemma2"))
def test_the_plan_of_both_kinds_of_blocks_is_that_of_all_to_the_byte(
    family: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, kept, run = FAMILIES[family]
    whole = step(config, kept, True, **options)
    assert whole.kept > step(config, 0, False, **options).kept, "kept activations are counted"
    ran = []

    def repeats(laps: list[blocks.Lap], way: blocks.Repetition) -> bool:
        ran.append(way.kept)
        return stock(laps, way)

    stock = blocks.repeats
    monkeypatch.setattr("leanlift.plan.fake.repeats", repeats)
    assert step(config, kept, False, **options) == whole
    assert ran == [run]


@pytest.mark.parametrize(("turned", "run"), [(False, 12), (True, None)])
def test_blocks_whose_kinds_would_change_places_are_all_run(turned: bool, run: int | None) -> None:
    """Some models ask by a block's place which kind of it is there."""
    kinds = ["sliding_attention", "full_attention"]
    layers = kinds * 6 + (kinds[::-1] if turned else kinds) * 4
    config = config_of("gemma2", num_hidden_layers=len(layers), layer_types=layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.gradient_checkpointing_enable()
    keep_last_blocks(model, 8)
    way = blocks.repetition(model)
    assert (None if way is None else way.kept) == run


def test_the_last_ones_are_kept_whatever_is_enabled_later() -> None:
    model = AutoModelForCausalLM.from_config(config_of("llama", num_hidden_layers=5)).train()
    ids = torch.zeros(1, 4, dtype=torch.long)
    model.gradient_checkpointing_enable()
    keep_last_blocks(model, 2)
    assert [b.gradient_checkpointing for b in model.model.layers] == [True] * 3 + [False] * 2
    model.gradient_checkpointing_disable()  # as for generation
    model.gradient_checkpointing_enable()
    model(ids)
    assert [b.gradient_checkpointing for b in model.model.layers] == [True] * 3 + [False] * 2
    keep_last_blocks(model, 0)
    model.gradient_checkpointing_enable()
    model(ids)
    assert all(b.gradient_checkpointing for b in model.model.layers)
    assert recomputed_blocks(model) == list(model.model.layers)


class Plain(nn.Module):
    """Blocks that transformers knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))


def test_more_than_there_are_is_refused_before_anything_is_loaded(
    checkpoints: dict[str, Path],
) -> None:
    args, sft = arguments(checkpoints["llama"], kept_blocks=3)
    with pytest.raises(UserError, match=r"kept_blocks=3 are more than the 2 blocks of this Llama"):
        check_memory_settings(args, sft)
    check_memory_settings(args, dataclasses.replace(sft, kept_blocks=2))
    with pytest.raises(UserError, match="no blocks that transformers checkpoints one by one"):
        keep_last_blocks(Plain(), 1)
    with pytest.raises(UserError, match="it is off, so all are kept"):
        LiftSFTConfig(output_dir="x", kept_blocks=1, gradient_checkpointing=False)
    with pytest.raises(UserError, match="kept_blocks as a whole number, 0 or more"):
        LiftSFTConfig(output_dir="x", kept_blocks=-1)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    wide = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 320}
    config = config_of("llama", num_hidden_layers=6, **wide)
    return make_checkpoint_of(config, tmp_path_factory.mktemp("deep"))


def attached(path: Path) -> Any:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=quantization("nf4+double"), dtype=torch.float32
    )
    return get_lift_model(base, LiftConfig(density=0.05, approx_rank=8), progress=False)


def values_of(model: Any) -> list[torch.Tensor]:
    layers = (m for m in model.modules() if isinstance(m, LiftLinear))
    return [layer.values.detach().clone() for layer in layers]


def test_a_run_is_the_same_to_the_bit_and_its_memory_is_as_planned(
    deep: Path, tmp_path: Path
) -> None:
    trained, peaks = [], []
    for settings in ({}, {"kept_blocks": 3}, {"reuse_weights": True}):
        args, sft = arguments(
            deep, approx_rank=8, max_steps=3, max_length=128, optim="sparse_adamw",
            per_device_train_batch_size=2, save_strategy="no", disable_tqdm=True,
            output_dir=str(tmp_path / str(settings)), **settings,
        )  # fmt: skip
        model = attached(deep)
        memory = MemoryCallback(MemoryMeter(torch.device("cpu")))
        LiftTrainer(
            model=model,
            args=sft,
            train_dataset=Dataset.from_list([{"text": "0123456789 is " * 40}] * 8),
            processing_class=make_tokenizer(),
            callbacks=[memory],
        ).train()
        assert memory.peak is not None
        batches = Batches(Batch(2, 128))
        planned = plan_of(args, sft, False, batches).phases["train"]
        assert abs(planned / memory.peak - 1) <= 0.05, (planned, memory.peak)
        trained.append(values_of(model))
        peaks.append(memory.peak)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*trained, strict=True))
    assert peaks[1] > 1.1 * peaks[0]
    assert peaks[2] > peaks[0]


@pytest.mark.thorough
def test_another_trainer_keeps_blocks_too(deep: Path, tmp_path: Path) -> None:
    trained, peaks = [], []
    for kept in (0, 3):
        model = attached(deep)
        args = TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, max_steps=2, save_strategy="no",
            report_to="none", disable_tqdm=True, gradient_checkpointing=True,
            per_device_train_batch_size=2,
        )  # fmt: skip
        rows = [{"input_ids": list(range(3, 99)), "labels": list(range(3, 99))}] * 4
        trainer = Trainer(
            model=model, args=args, train_dataset=Dataset.from_list(rows),
            callbacks=[LiftCallback(memory=False, kept_blocks=kept)],
        )  # fmt: skip
        with LiveBytes() as live:
            trainer.train()
        trained.append(values_of(model))
        peaks.append(live.peak)
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))
    assert peaks[1] > peaks[0]


def test_kept_activations_are_not_moved_where_others_are() -> None:
    """What kept blocks save stays, beside hooks that move what is saved."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of("llama", num_hidden_layers=4)).train()
    ids = torch.arange(3, 19).unsqueeze(0)
    moved: dict[int, int] = {}
    grads = []
    for kept in (0, 2, 4):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        keep_last_blocks(model, kept, offloading=True)
        seen: list[int] = []

        def pack(tensor: torch.Tensor, seen: list[int] = seen) -> torch.Tensor:
            seen.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(ids, labels=ids).loss.backward()
        moved[kept] = len(seen)
        grads.append(model.model.layers[0].mlp.up_proj.weight.grad.clone())
        model.zero_grad()
    assert moved[0] > moved[2] > moved[4]
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])
