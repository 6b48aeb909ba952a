"""Modelled step times: the counts of a small step by hand, and what settings buy."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SIZES
from planned import MODELS, arguments
from transformers import Gemma4TextConfig

from leanlift import UserError
from leanlift.plan import calibrate
from leanlift.plan.cards import CARDS, Card, card_named, card_of_size
from leanlift.plan.time import ATTENTION, BUS, PRODUCTS, TRAFFIC, step_time
from leanlift.plan.work import (
    FUSED_TOUCHES,
    TOUCHES,
    Matrix,
    ModelWork,
    Running,
    step_work,
)
from leanlift.training import plan_of

MATRICES = tuple(
    Matrix(block, m, n, entries, 1.0, m * n // 2, True)
    for block in (0, 1)
    for m, n, entries in ((8, 4, 3), (4, 8, 0))
)
MODEL = ModelWork(MATRICES, ((4, None), (4, 3)), 2, (10, 4))
RUN = Running(
    rows=2, tokens=6, trained=12, times=3, checkpointing=True, kept=1, offloading=False, item=2,
    value=2, streamed=0, learned=0, state=12,
)  # fmt: skip


def test_the_counts_of_a_small_step() -> None:
    work = step_work(MODEL, RUN)
    tokens, each = 12, 2 * 12 * 32
    assert work.forward.products == 4 * each
    assert work.recomputed.products == each, "the first block's but its last product"
    assert work.backward.products == (4 + 2) * each, "inputs' gradients, and two of values"
    assert work.loss.products == 3 * 2 * tokens * 10 * 4
    seen = 2 * (6 * 6 / 2) * 4 * 4, 2 * (6 * 3 - 3 * 3 / 2) * 4 * 4
    assert work.forward.attention == sum(seen)
    assert work.recomputed.attention == seen[0]
    assert work.backward.attention == 2.5 * sum(seen)
    made = [16 + 2 * 32 * 2 + entries * (1 + 2 + 4) for entries in (3, 0)] * 2
    around = 3 * tokens * (8 + 4) * 2
    assert work.forward.traffic == sum(made) + 4 * around
    assert work.optimizer.traffic == 3 * 2 * 6 + 2 * 12
    assert (work.times, work.tokens, work.recomputable) == (3, 12, 2)


def test_what_crosses_the_bus() -> None:
    four = dataclasses.replace(MODEL, attention=MODEL.attention * 2)
    moved = step_work(four, dataclasses.replace(RUN, streamed=400, offloading=True, kept=1))
    inputs = 3 * 12 * 4 * 2
    assert moved.forward.bus == moved.backward.bus == 400 * 2 / 4 + inputs
    learned = step_work(four, dataclasses.replace(RUN, streamed=400, learned=100))
    assert learned.forward.bus == 500 * 2 / 4
    sums, back = 2 * 6, 12 + 2 * 6  # moments and values, of one micro-batch in three
    assert learned.backward.bus == learned.forward.bus + sums + back / 3
    once = step_work(four, dataclasses.replace(RUN, streamed=400, learned=100, times=1))
    assert once.backward.bus == once.forward.bus + back
    alone = step_work(four, dataclasses.replace(RUN, offloading=True, checkpointing=False))
    assert alone.forward.bus == 12 * 2 * sum(m.n for m in MATRICES)


def test_a_token_meets_a_share_of_the_experts() -> None:
    shared = tuple(dataclasses.replace(m, share=0.25) for m in MATRICES)
    some, all_of_it = (
        step_work(dataclasses.replace(MODEL, matrices=matrices), RUN)
        for matrices in (shared, MATRICES)
    )
    assert some.forward.products == all_of_it.forward.products / 4


def test_fused_kernels_touch_less_between_products() -> None:
    """And nothing else: the same products, weights and loss."""
    work, fused = (step_work(MODEL, dataclasses.replace(RUN, fused=way)) for way in (False, True))
    around = 4 * 12 * (8 + 4) * 2  # of four products, once
    saved = (TOUCHES - FUSED_TOUCHES) * around
    assert work.forward.traffic - fused.forward.traffic == pytest.approx(saved)
    assert work.backward.traffic - fused.backward.traffic == pytest.approx(2 * saved)
    assert (fused.loss, fused.optimizer) == (work.loss, work.optimizer)
    assert fused.forward.products == work.forward.products


def test_seconds_are_work_by_what_a_card_reaches() -> None:
    card = Card("a card", 8, 1000.0, 100.0, 10.0)
    work = step_work(MODEL, RUN)
    time = step_time(work, card)
    part = work.recomputed
    wanted = (part.products / PRODUCTS + part.attention / ATTENTION) / 1000
    wanted += part.traffic / (TRAFFIC * 100)
    assert time.parts["recomputation"] == pytest.approx(3 * wanted)
    assert time.parts["waiting for the bus"] == 0
    slow = step_time(step_work(MODEL, dataclasses.replace(RUN, offloading=True)), card)
    assert slow.parts["waiting for the bus"] == 0, "it is hidden behind what is computed"
    slower = dataclasses.replace(card, bus=1e-3)
    late = step_time(step_work(MODEL, dataclasses.replace(RUN, offloading=True)), slower)
    forward = time.parts["forward pass"] + time.parts["loss"]
    over = 12 * 4 * 2 / (BUS * 1e-3)
    assert late.parts["forward pass"] + late.parts["loss"] == forward
    assert late.seconds > 3 * 2 * over - time.seconds
    measured = dataclasses.replace(card, measured=True)
    assert step_time(work, measured).seconds < time.seconds
    assert time.to_dict()["tokens_per_second"] == pytest.approx(36 / time.seconds)


def test_what_a_gigabyte_buys_is_monotone(checkpoints: dict[str, Path]) -> None:
    """More kept blocks need more and take less time, as larger micro-batches do."""
    card = card_named("RTX 3060")

    def found(**changes: Any) -> tuple[float, int]:
        plan = plan_of(*arguments(checkpoints["llama"], approx_rank=8, **changes), cuda=True)
        assert plan.work is not None
        return step_time(plan.work, card).seconds, plan.step["kept for the backward pass"]

    kept = [found(kept_blocks=count) for count in (0, 1, 2)]
    rows = [
        found(per_device_train_batch_size=2**n, gradient_accumulation_steps=4 // 2**n)
        for n in (0, 1, 2)
    ]
    plain = found()[0]
    for change in ("reuse_weights", "fused_elementwise"):
        assert found(**{change: True})[0] < plain, change
    for line in kept, rows:
        assert [s for s, _ in line] == sorted({s for s, _ in line}, reverse=True)
        assert [n for _, n in line] == sorted({n for _, n in line})


@pytest.mark.parametrize("name", ["llama", "qwen3, experts"])
def test_a_plan_counts_the_shapes_of_its_model(name: str, checkpoints: dict[str, Path]) -> None:
    plan = plan_of(*arguments(checkpoints[name], approx_rank=8, kept_blocks=1), cuda=True)
    config, work = MODELS[name], plan.work
    assert work is not None
    assert work.recomputable == config.num_hidden_layers
    tokens, d = 4 * 64, config.hidden_size
    heads = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    block = d * (2 * heads + 2 * keys)
    block += (
        2 * 3 * config.moe_intermediate_size * d
        if "experts" in name
        else 3 * config.intermediate_size * d
    )
    assert work.forward.products == 2 * tokens * 2 * block
    assert work.loss.products == 6 * tokens * config.vocab_size * d
    assert plan.to_dict()["time"] is None
    assert "work" not in json.loads(json.dumps(plan.to_dict()))


def test_heads_may_differ_from_block_to_block(tmp_path: Path) -> None:
    """Of such a model transformers lets nobody ask what its heads are."""
    sliding, full = "sliding_attention", "full_attention"
    config = Gemma4TextConfig(
        **SIZES, head_dim=16, global_head_dim=32, sliding_window=8, layer_types=[sliding, full],
        hidden_size_per_layer_input=16, vocab_size_per_layer_input=128,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    given = arguments(tmp_path, approx_rank=8, max_length=16, per_device_train_batch_size=1)
    work = plan_of(*given, cuda=True).work
    assert work is not None
    seen = (4 * 16 * (16 * 8 - 8 * 8 / 2), 4 * 32 * 16 * 16 / 2)
    assert work.forward.attention == 4 * sum(seen)


def test_a_calibration_reads_the_clock_around_what_it_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calibrate, "SIDES", ((2, 3, 4), (1, 2, 3)))
    monkeypatch.setattr(calibrate, "COPIED", 1000)
    monkeypatch.setattr(calibrate, "OVER_BUS", 500)
    ticks = iter(range(0, 1000, 2))
    card = calibrate.calibrated(CARDS[0], torch.device("cpu"), lambda: float(next(ticks)))
    seconds = 2 / calibrate.TIMES
    assert card.measured
    assert card.flops == pytest.approx((2 * 24 + 2 * 6) / (2 * seconds))
    assert card.bandwidth == pytest.approx(2000 / seconds)
    assert card.bus == pytest.approx(500 / seconds)
    assert next(ticks) == 16, "two looks at the clock for each of four"
    assert calibrate.detected() is None, "there is no card"


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("rtx4090", "RTX 4090"), ("NVIDIA GeForce RTX 4060 Ti", "RTX 4060 Ti"),
        ("4070", "RTX 4070"), ("a100", "A100 80GB"), ("NVIDIA A100 40GB PCIe", "A100 40GB"),
        ("h100", "H100 SXM"), ("RTX-4060-ti", "RTX 4060 Ti"), ("rtx 5090", "RTX 5090"),
        ("Tesla T4", "T4"),
    ],
)  # fmt: skip
def test_cards_by_name(asked: str, name: str) -> None:
    assert card_named(asked).name == name


@pytest.mark.parametrize(
    "name", ["", "RTX 9999", "card", "L40S", "RTX 4060", "RTX 4070 Ti", "rtx", "Quadro T400"]
)
def test_a_card_that_is_not_known_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="expected card as one of RTX 3060, "):
        card_named(name)


def test_a_size_has_a_card_that_stands_for_it() -> None:
    sizes = {8: "RTX 3060", 12: "RTX 3060", 16: "RTX 4060 Ti", 24: "RTX 3090", 48: "A100 80GB"}
    assert {gib: card_of_size(gib).name for gib in sizes} == sizes
    assert card_of_size(1000).gib == 80
    assert [card.gib for card in CARDS] == sorted(card.gib for card in CARDS)


def test_weights_of_tiled_mlps_are_made_for_each_piece() -> None:
    run = dataclasses.replace(RUN, rows=1, tokens=8192, offloading=False)
    in_pieces = tuple(dataclasses.replace(matrix, in_pieces=True) for matrix in MATRICES)
    plain, tiled = (
        step_work(dataclasses.replace(MODEL, matrices=each), run) for each in (MATRICES, in_pieces)
    )
    made = [16 + 2 * 32 * 2 + entries * (1 + 2 + 4) for entries in (3, 0)] * 2
    assert tiled.forward.traffic - plain.forward.traffic == 3 * sum(made), "four pieces, not one"
    assert tiled.forward.products == plain.forward.products
    larger = step_work(
        dataclasses.replace(MODEL, matrices=in_pieces), dataclasses.replace(run, mlp_tokens=4096)
    )
    assert larger.forward.traffic - plain.forward.traffic == sum(made), "two pieces"
