"""The step through many like blocks from the step through few: the same to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import config_of
from sweeps import swept
from torch import nn
from transformers import AutoModelForCausalLM

from leanlift import LiftConfig
from leanlift.layers import LiftLinear, Workspace
from leanlift.layers.lm_head import Head, Objective, head_loss
from leanlift.measure import LiveBytes
from leanlift.plan import blocks
from leanlift.plan.base import without_packing_search
from leanlift.plan.fake import (
    StepBytes,
    attach_fake,
    even_index,
    fake_tensors,
    forward_peak,
    step_peak,
)
from leanlift.plan.loss import loss_of_all_tokens
from leanlift.plan.pieces import first_pieces, first_tiles
from leanlift.plan.stand_ins import fused_attention
from leanlift.tiles import DenseTiles
from leanlift.weights.empty import empty_weight
from leanlift.weights.quantized import WeightDense, WeightFormat

SLIDING, FULL = "sliding_attention", "full_attention"
FAMILIES: dict[str, tuple[Any, int | None]] = {
    "llama": (config_of("llama", num_hidden_layers=6), 4),
    "qwen2, tied": (config_of("qwen2, tied", num_hidden_layers=7), 4),
    "qwen3": (config_of("qwen3", num_hidden_layers=6), 4),
    "mistral": (config_of("mistral", num_hidden_layers=6), 4),
    "phi3, fused": (config_of("phi3, fused", num_hidden_layers=5), 4),
    "gemma2": (config_of("gemma2", num_hidden_layers=11), 7),
    "gemma3": (config_of("gemma3", num_hidden_layers=26), 20),
    "qwen3, experts": (config_of("qwen3, experts", num_hidden_layers=6), 4),
    "gpt2, turned": (config_of("gpt2, turned", num_hidden_layers=6), 4),
    "no pattern": (
        config_of("gemma2", num_hidden_layers=5, layer_types=[SLIDING, FULL, FULL, SLIDING, FULL]),
        None,
    ),
}
"""A model, and how many of its blocks are run; None: all."""


def step(config: Any, whole: bool, lift: LiftConfig, **settings: Any) -> StepBytes:
    checkpointing = settings.pop("checkpointing", False)
    fmt = WeightFormat("nf4", "float32", 64, True)
    with without_packing_search(), fake_tensors():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        attach_fake(model, lift, fmt)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        options = {"in_backward": False, "accumulate": False, **settings}
        return step_peak(model, loss_of_all_tokens, 1, 32, whole=whole, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_so_many_blocks_are_run(family: str) -> None:
    config, kept = FAMILIES[family]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    way = blocks.repetition(model)
    assert (None if way is None else way.kept) == kept


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"checkpointing": True},
    "accumulation": {"checkpointing": True, "accumulate": True},
    "in backward": {"in_backward": True, "checkpointing": True},
    "offloading": {"offload": True, "in_backward": True, "checkpointing": True},
}


@pytest.mark.parametrize("settings", swept(SETTINGS, "in backward"))
@pytest.mark.parametrize("family", swept(["llama", "gemma2", "qwen3, experts"], "llama"))
def test_the_extended_step_is_the_whole_one_to_the_byte(
    family: str, settings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, lift = FAMILIES[family][0], LiftConfig(approx_rank=8)
    whole = step(config, True, lift, **SETTINGS[settings])
    monkeypatch.setattr("leanlift.plan.fake.repeats", _must_repeat)
    assert step(config, False, lift, **SETTINGS[settings]) == whole
    assert min(whole.forward, whole.loss, whole.kept, whole.backward) > 0


@pytest.mark.parametrize("family", swept(FAMILIES, "phi3, fused"))
def test_every_family_under_checkpointing(family: str) -> None:
    config, lift = FAMILIES[family][0], LiftConfig(approx_rank=8, density=0.2)
    assert step(config, False, lift, checkpointing=True) == step(
        config, True, lift, checkpointing=True
    )


@pytest.mark.parametrize("family", swept(["llama", "gemma3"], "llama"))
def test_an_evaluation_is_planned_from_a_few_blocks_too(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate() -> int:
        with without_packing_search(), fake_tensors():
            model = AutoModelForCausalLM.from_config(FAMILIES[family][0], dtype=torch.float32)
            attach_fake(model, LiftConfig(approx_rank=8), WeightFormat("nf4", "float32", 64, True))
            return forward_peak(model.eval(), loss_of_all_tokens, 2, 32)

    part = evaluate()
    monkeypatch.setattr("leanlift.plan.fake.repetition", lambda model: None)
    assert part == evaluate() > 0


def _must_repeat(laps: list[blocks.Lap], way: blocks.Repetition) -> bool:
    assert blocks.repeats(laps, way), "the step fell back to the whole model"
    return True


@pytest.mark.thorough
@pytest.mark.parametrize(
    "pattern",
    swept(
        [{r"layers\.0\..*": 0.3}, {r"layers\.4\..*": 0.3}, {r"layers\.[5-8]\.mlp\.down_proj": 0.5}],
        {r"layers\.0\..*": 0.3},
    ),
    ids=["the first differs", "one inside differs", "the last ones differ"],
)
def test_blocks_with_budgets_of_their_own_are_other_blocks(pattern: dict[str, float]) -> None:
    config = config_of("llama", num_hidden_layers=9)
    lift = LiftConfig(approx_rank=8, density_pattern=pattern)
    assert step(config, False, lift) == step(config, True, lift)


def test_laps_that_differ_are_not_repeated() -> None:
    way = blocks.Repetition("layers", (0, 1, 2), (blocks.Stretch(0, kept=3, period=1, times=4),))
    laps = [
        blocks.Lap(("forward", 0), 10, 5),
        blocks.Lap(("forward", 1), 12, 8),
        blocks.Lap(("forward", 2), 15, 11),
        blocks.Lap(("loss", 0), 20, 12),
        blocks.Lap(("backward", 3), 20, 11),
        blocks.Lap(("backward", 2), 14, 8),
        blocks.Lap(("backward", 1), 11, 5),
        blocks.Lap(("done", 0), 6, 0),
    ]
    assert blocks.repeats(laps, way)
    whole = blocks.whole_step(laps, way)
    assert [lap.end for lap in whole if lap.mark[0] == "forward"] == [5, 8, 11, 14, 17, 20, 23]
    assert max(lap.peak for lap in whole) == 20 + 4 * 3
    assert whole[-1].end == 0
    laps[2] = blocks.Lap(("forward", 2), 16, 11)
    assert not blocks.repeats(laps, way)
    assert not blocks.repeats(laps[:-2], way)


@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
@pytest.mark.parametrize("kind", ["nf4", "int8", "dense"])
@pytest.mark.parametrize("tokens", swept([300, 64], 300))
@pytest.mark.parametrize("shape", [(3000, 4096), (640, 512), (4100, 2048)], ids=str)
def test_first_pieces_have_the_peak_of_all(
    shape: tuple[int, int], tokens: int, kind: str, device_type: str
) -> None:
    """A step of one layer, its matrices and tokens gone over in many pieces or in two."""
    fmt = None if kind == "dense" else WeightFormat(kind, "float32", 64)

    def peak(workspace: Workspace) -> int:
        with fake_tensors():
            dense = WeightDense(nn.Linear(shape[1], shape[0], bias=False))
            weight: Any = dense if fmt is None else empty_weight(shape, fmt)
            index = even_index(shape, shape[0] * shape[1] // 20)
            layer = LiftLinear(weight.module, weight, index, workspace)
            x = torch.zeros(tokens, shape[1], requires_grad=True)
            with LiveBytes() as live:
                layer(x).sum().backward()
            return live.peak

    whole = peak(Workspace(stands_for=device_type))
    assert peak(first_pieces(device_type)) == whole > 0


@pytest.mark.thorough
def test_gradients_that_are_there_already_count_like_an_earlier_pass() -> None:
    """One pass beside them is the second of two passes."""
    lift, fmt = LiftConfig(approx_rank=8), WeightFormat("nf4", "float32", 64, True)
    config = FAMILIES["llama"][0]
    planned = step(config, True, lift, accumulate=True)
    with without_packing_search(), fake_tensors():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        attach_fake(model, lift, fmt)
        model.train()
        ids = torch.zeros(1, 32, dtype=torch.long)
        with fused_attention(), LiveBytes() as live:
            for _ in range(2):
                loss_of_all_tokens(model, ids, ids.clone()).backward()
            live.peak = live.current
            loss_of_all_tokens(model, ids, ids.clone()).backward()
    # made in the first pass here, before a step in a plan
    scratch = 4 * config.hidden_size * config.intermediate_size
    assert live.peak - scratch == planned.peak


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width"), [(3000, 64), (100, 2048), (20, 64)])
def test_the_first_tiles_of_a_vocabulary_have_the_peak_of_all(
    tokens: int, width: int, dtype: torch.dtype, smoothing: float
) -> None:
    def peak(part: bool) -> int:
        with fake_tensors():
            head = Head(DenseTiles(torch.empty(130_000, width)), torch.empty(130_000), 30.0)
            hidden = torch.empty(tokens, width, dtype=dtype, requires_grad=True)
            head = first_tiles(head, hidden) if part else head
            labels = torch.zeros(tokens, dtype=torch.int64)
            with LiveBytes() as live:
                made = head_loss(hidden, labels, head, 1.0, objective=Objective(smoothing))
                made.loss.backward()
            return live.peak

    assert peak(part=True) == peak(part=False) > 0
