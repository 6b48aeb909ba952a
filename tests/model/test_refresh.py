"""Hysteresis and the bound on retired entries, against plain loops."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_base, make_lift, retire, retired_flat
from runs import sparse_trainer
from sweeps import swept
from tiny import load
from torch import Tensor

from leanlift import LiftConfig, UserError, get_lift_model, refresh_mask
from leanlift.measure import LiveBytes
from leanlift.model import lift_layers
from leanlift.model.refresh import EXCHANGE_PER_ENTRY, _choose, refresh_nbytes
from leanlift.optim import SparseAdamW, remap_entries
from leanlift.selection import Favoring, Magnitude, Principal, scores_of, select, selection
from leanlift.sparse import LayerOffsets, Offsets, SegmentedIndex, bounded_mask, retired_nbytes
from leanlift.training import RunArguments

# --- The margin ----------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("margin", [0.1, 1.0, 30.0])
def test_an_entry_leaves_only_where_a_newcomer_beats_it_by_the_margin(
    block: int, margin: float
) -> None:
    m, n, count = 520, 48, 1600
    torch.manual_seed(0)
    weight = torch.randn(m, n)
    scorer = Principal(rank=8, block=block)
    old = select(weight + 0.3 * torch.randn(m, n), scorer, count)
    index = SegmentedIndex.from_flat(old, (m, n))
    got = selection(weight, Favoring(scorer, index, margin), count, tile_bytes=64 * n).flat
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    scores = ((u[:, :8] * s[:8]) @ vh[:8]).abs()
    scores.view(-1)[old] *= 1 + margin
    if block > 1:
        scores = scores.view(m // block, block, n // block, block).sum(dim=(1, 3))
        best = torch.topk(scores.flatten(), count // block**2).indices
        chosen = torch.zeros(scores.numel(), dtype=torch.bool)
        chosen[best] = True
        grown = chosen.view_as(scores).repeat_interleave(block, 0).repeat_interleave(block, 1)
        wanted = grown.flatten().nonzero().squeeze(1)
    else:
        wanted = torch.topk(scores.flatten(), count).indices.sort().values
    assert torch.equal(got, wanted)
    if margin == 30:
        assert torch.isin(got, old).float().mean() > 0.9


def test_a_refresh_heeds_the_margin(base: Path) -> None:
    churn = []
    for margin in (0.0, 0.2, 1e6):
        config = LiftConfig(density=0.1, approx_rank=4, refresh_margin=margin, retired_limit=None)
        model = get_lift_model(load(base), config, progress=False)
        torch.manual_seed(0)
        for layer in lift_layers(model).values():
            layer.values.data.normal_(0, 0.05)
        churn.append(refresh_mask(model).churn)
    assert churn[0] > churn[1] > 0
    assert churn[2] == 0


def test_favoring_does_not_touch_the_scores_it_reads() -> None:
    weight = torch.randn(300, 20)
    index = SegmentedIndex.from_flat(torch.arange(0, 6000, 3), (300, 20))
    scores = Favoring(Magnitude(), index, 1.0).prepare(weight_tiles(weight), 10, 2**20)
    once, again = scores.scores(0, 256), scores.scores(0, 256)
    assert torch.equal(once, again)
    assert torch.equal(once.view(-1)[::3], 2 * weight[:256].abs().view(-1)[::3])
    assert torch.equal(once.view(-1)[1::3], weight[:256].abs().view(-1)[1::3])


def weight_tiles(weight: Tensor) -> Any:
    from leanlift.tiles import as_tiles

    return as_tiles(weight)


@pytest.mark.parametrize("block", [1, 4])
def test_scores_are_those_that_a_selection_ranks_by(block: int) -> None:
    m, n = 516, 40
    weight = torch.randn(m, n)
    chosen = selection(weight, Principal(rank=4, block=block), 320)
    dense = chosen.scores.scores(0, m)
    if block > 1:
        dense = dense.view(m // block, block, n // block, block).sum(dim=(1, 3))
    units = torch.randperm(dense.numel())[:200].sort().values
    torch.testing.assert_close(
        scores_of(chosen.scores, units, (m, n), block), dense.flatten()[units]
    )
    assert scores_of(chosen.scores, units[:0], (m, n), block).numel() == 0


# --- The bound -----------------------------------------------------------------------------


def by_hand(
    old: dict[int, float],
    new: set[int],
    retired: set[int],
    bound: int,
    score: Tensor,
    block: int,
    columns: int,
) -> tuple[set[int], int]:
    """The rule, unit by unit, in plain Python."""

    def unit(entry: int) -> int:
        return entry // columns // block * (columns // block) + entry % columns // block

    came: dict[int, list[int]] = {}
    went: dict[int, list[int]] = {}
    for entry in sorted(new - set(old)):
        came.setdefault(unit(entry), []).append(entry)
    for entry in sorted(set(old) - new):
        went.setdefault(unit(entry), []).append(entry)
    best = sorted(came, key=lambda u: (-float(score[u]), u))
    weakest = sorted(went, key=lambda u: (float(score[u]), -u))
    pairs, size = 0, len(retired)
    bound = max(bound, size)
    for number, (one, other) in enumerate(zip(best, weakest, strict=True), start=1):
        size += sum(old[entry] != 0 for entry in went[other])
        size -= sum(entry in retired for entry in came[one])
        if size <= bound:
            pairs = number
    mask = set(new & set(old))
    for one in best[:pairs]:
        mask |= set(came[one])
    for other in weakest[pairs:]:
        mask |= set(went[other])
    return mask, sum(len(came[one]) for one in best[pairs:])


@pytest.mark.parametrize("seed", range(60))
def test_the_bound_holds_back_what_the_rule_says(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def number(high: int) -> int:
        return int(torch.randint(high, (1,), generator=generator))

    block, columns = (1, 24) if seed % 3 else (4, 24)
    rows = 4 * (2 + number(6))
    units = rows * columns // block**2
    score = torch.randint(6, (units,), generator=generator).float()  # many ties
    count = max(1, units // 4)

    def entries(chosen: Tensor) -> Tensor:
        mask = torch.zeros(units, dtype=torch.bool)
        mask[chosen] = True
        grid = mask.view(rows // block, columns // block)
        return (
            grid.repeat_interleave(block, 0).repeat_interleave(block, 1).flatten().nonzero()
        ).squeeze(1)

    old = entries(torch.randperm(units, generator=generator)[:count])
    new = entries(torch.randperm(units, generator=generator)[:count])
    values = torch.randn(old.numel(), generator=generator)
    values[torch.rand(old.numel(), generator=generator) < 0.3] = 0
    outside = torch.ones(rows * columns, dtype=torch.bool)
    outside[old] = False
    outside = outside.nonzero().squeeze(1)
    keep = torch.rand(outside.numel(), generator=generator) < 0.3
    retired = outside[keep]
    bound = retired.numel() + number(old.numel()) - number(8)
    shape, asleep = (rows, columns), torch.ones(retired.numel())
    learned = LayerOffsets(
        Offsets.from_flat(old, values, shape), Offsets.from_flat(retired, asleep, shape)
    )
    got = bounded_mask(learned, new, bound, block, lambda u: score[u])
    wanted, held = by_hand(
        dict(zip(old.tolist(), values.tolist(), strict=True)),
        set(new.tolist()),
        set(retired.tolist()),
        bound,
        score,
        block,
        columns,
    )
    assert got.flat.tolist() == sorted(wanted)
    assert got.held_back == held
    assert got.flat.numel() == old.numel()


def test_scores_are_read_only_where_the_bound_is_reached() -> None:
    old, new = torch.arange(0, 10), torch.arange(5, 15)

    def never(units: Tensor) -> Tensor:
        raise AssertionError

    learned = LayerOffsets(Offsets.from_flat(old, torch.ones(10), (2, 20)))
    got = bounded_mask(learned, new, 5, 1, never)
    assert torch.equal(got.flat, new)
    assert got.held_back == 0
    with pytest.raises(AssertionError):
        bounded_mask(learned, new, 4, 1, never)


@pytest.mark.parametrize(
    ("block", "margin"), swept([(1, 0.0), (1, 0.2), (4, 0.0), (4, 0.2)], (1, 0.2))
)
def test_twenty_refreshes_of_a_drifting_model_keep_the_bound_and_lose_nothing(
    base: Path, block: int, margin: float
) -> None:
    config = LiftConfig(
        density=0.1, approx_rank=4, block=block, retired_limit=0.3, refresh_margin=margin
    )
    model = get_lift_model(load(base), config, progress=False)
    layers = lift_layers(model)
    held = 0
    for _ in range(20):
        for layer in layers.values():
            layer.values.data.add_(0.05 * torch.randn_like(layer.values))
        counts = {name: layer.index.count for name, layer in layers.items()}
        before = {
            name: layer.effective.rows(0, layer.out_features) for name, layer in layers.items()
        }
        report = refresh_mask(model)
        held += report.held_back
        for name, layer in layers.items():
            assert layer.index.count == counts[name]
            kept = retired_flat(layer)
            assert kept.numel() <= int(0.3 * layer.index.count)
            assert layer.retired_nbytes <= retired_nbytes(
                layer.index.shape, int(0.3 * layer.index.count)
            )
            assert not torch.isin(kept, layer.index.to_flat()).any()
            assert torch.equal(layer.effective.rows(0, layer.out_features), before[name]), name
        assert report.retired == sum(retired_flat(layer).numel() for layer in layers.values())
        assert report.retired_nbytes == sum(layer.retired_nbytes for layer in layers.values())
    assert held > 0


def test_the_rule_of_bytes_is_that_of_the_tensors() -> None:
    shape = (300, 700)
    layer = make_lift(make_base("dense", *shape))
    free = torch.ones(shape[0] * shape[1], dtype=torch.bool)
    free[layer.index.to_flat()] = False
    outside = free.nonzero().view(-1)
    for count in (0, 1, 5000):
        flat = outside[torch.randperm(outside.numel())[:count]].sort().values
        retire(layer, flat, torch.ones(count))
        assert layer.retired_nbytes == retired_nbytes(shape, count)


def test_without_margin_and_bound_a_refresh_is_the_plain_selection(base: Path) -> None:
    plain = LiftConfig(density=0.1, approx_rank=4, retired_limit=None)
    model = get_lift_model(load(base), plain, progress=False)
    for layer in lift_layers(model).values():
        layer.values.data.normal_(0, 0.1)
    wanted = {
        name: select(layer.effective, Principal(rank=4), layer.index.count)
        for name, layer in lift_layers(model).items()
    }
    refresh_mask(model)
    for name, layer in lift_layers(model).items():
        assert torch.equal(layer.index.to_flat(), wanted[name])


def test_a_full_store_is_said_once(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lift = LiftConfig(density=0.1, approx_rank=8, refresh_interval=2, retired_limit=0.01)
    trainer = sparse_trainer(base, tmp_path, lift, learning_rate=3e-2, max_steps=11)
    with caplog.at_level(logging.WARNING, "leanlift"):
        trainer.train()
    assert sum(report.held_back > 0 for report in trainer.refreshes) >= 2
    said = [r.getMessage() for r in caplog.records if "is full" in r.getMessage()]
    assert len(said) == 1
    assert "retired_limit=0.01" in said[0]
    logged = [entry for entry in trainer.state.log_history if "refresh_held_back" in entry]
    assert [entry["refresh_held_back"] for entry in logged] == [
        report.held_back for report in trainer.refreshes
    ]
    assert all(entry["refresh_retired_bytes"] > 0 for entry in logged[1:])


def test_settings_out_of_range_are_refused() -> None:
    for changes, message in (
        ({"refresh_margin": -0.1}, "refresh_margin as a number, 0 or more; got -0.1"),
        ({"refresh_margin": float("nan")}, "refresh_margin as a number, 0 or more"),
        ({"retired_limit": -1.0}, "retired_limit as a number, 0 or more .*or none"),
        ({"retired_limit": float("inf")}, "retired_limit as a number, 0 or more .*or none"),
    ):
        with pytest.raises(UserError, match=message):
            LiftConfig(**changes)  # type: ignore[arg-type]
    args = {"model_name_or_path": "x", "dataset_name": "y"}
    assert RunArguments(**args).lift_config().retired_limit == 0.5
    assert RunArguments(**args, retired_limit=None).lift_config().retired_limit is None
    assert RunArguments(**args, refresh_margin=0.2).lift_config().refresh_margin == 0.2


@pytest.mark.parametrize("limit", [None, 0.02, 0.5])
@pytest.mark.parametrize("density", swept([0.05, 0.3], 0.05))
def test_a_refresh_takes_no_more_than_its_rule(density: float, limit: float | None) -> None:
    """Of a matrix that is read in several tiles, a tenth of whose entries want to be replaced."""
    shape = 1536, 512
    lift = make_lift(make_base("nf4", *shape), density=density)
    config = LiftConfig(density=density, approx_rank=8, selection_tile_mib=1, retired_limit=limit)
    lift.values.data.zero_()
    lift.change_mask(selection(lift.effective, config.scorer(), lift.index.count).flat)
    lift.values.data.normal_(0, 0.003)
    optimizer = SparseAdamW([lift.values])
    lift.values.grad = torch.ones_like(lift.values)
    optimizer.step()
    rule = refresh_nbytes(config, {"w": shape}, {"w": lift.index.count})
    exchange = EXCHANGE_PER_ENTRY * lift.index.count
    for _ in range(2):
        with LiveBytes() as live:
            mask, _ = _choose(lift, "w", config)
        assert 0.3 * rule <= live.peak <= rule
        with LiveBytes() as live:
            change = lift.change_mask(mask.flat)
            remap_entries(optimizer, lift.values, change.source)
        assert change.churn < 0.15
        assert 0.5 * exchange <= live.peak - live.current <= exchange
    assert lift.retired_nbytes
