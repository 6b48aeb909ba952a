"""The streamed top-k is exact, and every selector gives a set of the size asked for."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from helpers import (
    examples,
    make_base,
    make_linear4bit,
    random_weight,
    trained_like,
)
from hypothesis import given
from hypothesis import strategies as st
from routes import _shape_id
from sweeps import swept
from torch import Tensor

from leanlift.errors import UserError
from leanlift.measure import LiveBytes
from leanlift.selection import (
    Magnitude,
    Principal,
    Random,
    Scorer,
    count_by_density,
    count_by_rank,
    select,
    selection,
    selection_nbytes,
)
from leanlift.selection.blocks import tile_nbytes
from leanlift.selection.topk import StreamedTopK, topk_nbytes
from leanlift.tiles import DEFAULT_TILE_BYTES, DenseTiles, StackTiles
from leanlift.weights.quantized import frozen_weight

SCORES = st.sampled_from([0.0, -0.0, 1e-45, 3e-45, 1e-38, 0.5, 1.0, 1.0000001, 3e38])


def _stream(scores: Tensor, count: int, cuts: list[int]) -> list[int]:
    edges = [0, *cuts, scores.numel()]
    largest = max(b - a for a, b in pairwise(edges))
    top = StreamedTopK(count, scores.numel(), largest, torch.device("cpu"))
    for start, stop in pairwise(edges):
        top.push(scores[start:stop], start)
    return top.flat().tolist()


@examples(300)
@given(data=st.data())
def test_the_streamed_top_k_equals_a_stable_sort(data: st.DataObject) -> None:
    """Few distinct scores, so that ties cross tiles; any cut, empty tiles included."""
    scores = data.draw(st.lists(SCORES, min_size=0, max_size=60), "scores")
    count = data.draw(st.integers(0, len(scores)), "count")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(scores)), max_size=20), "cuts"))
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    assert _stream(torch.tensor(scores), count, cuts) == sorted(order[:count])


def test_the_streamed_top_k_holds_few_candidates() -> None:
    total, count, block = 2_000_000, 20_000, 10_000
    scores = torch.linspace(0, 1, total)
    with LiveBytes() as live:
        top = StreamedTopK(count, total, block, torch.device("cpu"))
        for start in range(0, total, block):
            top.push(scores[start : start + block], start)
    assert live.peak <= topk_nbytes(count, total, block) < total
    assert torch.equal(top.flat(), torch.arange(total - count, total))


# --- every selector -------------------------------------------------------------------------

each_scorer = pytest.mark.parametrize(
    "scorer",
    [Principal(rank=4), Principal(rank=1000), Magnitude(), Random()],
    ids=["principal", "full-rank", "magnitude", "random"],
)


@each_scorer
@pytest.mark.parametrize("count", [0, 1, 77, 65 * 48], ids=lambda count: f"count-{count}")
def test_a_mask_is_a_sorted_set_of_the_count_asked_for(scorer: Scorer, count: int) -> None:
    flat = select(random_weight(65, 48), scorer, count)
    assert (flat.dtype, flat.numel()) == (torch.int64, count)
    assert flat.tolist() == sorted(set(flat.tolist()) & set(range(65 * 48)))


@each_scorer
@pytest.mark.parametrize("count", [-1, 65 * 48 + 1])
def test_an_impossible_count_is_refused(scorer: Scorer, count: int) -> None:
    with pytest.raises(UserError, match=rf"0 to 3120 entries of q_proj \(65x48\), got {count}\."):
        selection(random_weight(65, 48), scorer, count, name="q_proj")


@each_scorer
def test_a_damaged_matrix_is_refused_with_the_number_of_bad_entries(scorer: Scorer) -> None:
    weight = random_weight(65, 48)
    weight[0, 0], weight[40, 7], weight[64, 47] = float("nan"), float("inf"), -float("inf")
    with pytest.raises(UserError, match="up_proj has 3 NaN or infinite weights of 3120"):
        selection(weight, scorer, 10, name="up_proj")


@pytest.mark.parametrize(
    "route", swept(["gram", "gram-wide", "krylov", "krylov-int8"], "krylov-int8")
)
@pytest.mark.parametrize("scorer", [Principal(rank=16), Magnitude(), Random()], ids=type)
def test_a_mask_does_not_depend_on_the_size_of_the_tiles(scorer: Scorer, route: str) -> None:
    """Bit for bit: what is read at once is not what is computed at once."""
    m, n = {"gram": (1300, 300), "gram-wide": (700, 900)}.get(route, (1300, 800))
    weight = trained_like(m, n)
    tiles = frozen_weight(make_base("int8", m, n)) if "int8" in route else DenseTiles(weight)
    masks = [selection(tiles, scorer, 9000, tile_bytes=1 << bits).flat for bits in (10, 21, 30)]
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


@pytest.mark.parametrize(
    "shape",
    swept([(1300, 800), (600, 2100), (300, 3000)], (600, 2100), whole=True),
    ids=_shape_id,
)
@pytest.mark.parametrize(
    "scorer",
    [Principal(rank=16), Principal(rank=100), Principal(rank=16, block=4), Magnitude(), Random()],
    ids=["rank-16", "rank-100", "blocks", "magnitude", "random"],
)
@pytest.mark.parametrize("bits", swept([16, 25], 16), ids=["small-tiles", "default-tiles"])
def test_a_selection_stays_within_its_rule(
    shape: tuple[int, int], scorer: Scorer, bits: int
) -> None:
    """The rule is made from shapes alone, and is no more than three times too careful."""
    tiles = frozen_weight(make_linear4bit(*shape, weight=trained_like(*shape)))
    count = count_by_density(shape, 0.05)
    with LiveBytes() as live:
        selection(tiles, scorer, count, tile_bytes=1 << bits)
    rule = selection_nbytes(scorer, shape, count, 1 << bits)
    assert live.peak <= rule <= 3 * live.peak


def test_the_masks_of_a_stack_are_all_that_is_kept_of_its_matrices() -> None:
    """Not the factors that each was chosen by."""
    experts, shape, scorer = 12, (300, 256), Principal(rank=32)
    count = count_by_density(shape, 0.02)
    matrix = trained_like(*shape)
    with LiveBytes() as one:
        selection(matrix, scorer, count)
    with LiveBytes() as all_:
        found = selection(StackTiles.of(torch.stack([matrix] * experts)), scorer, count)
    assert found.flat.numel() == experts * count
    stack, positions = experts * matrix.nbytes, 8 * experts * count
    assert all_.peak <= one.peak + stack + positions + 2 * 4 * 32 * sum(shape)


class NarrowTiles(DenseTiles):
    """A matrix that refuses to be read by more rows than a tile has."""

    widest = 0

    def rows(self, start: int, stop: int) -> Tensor:
        assert (stop - start) * self.shape[1] * 4 <= tile_nbytes(self.shape, 4, DEFAULT_TILE_BYTES)
        object.__setattr__(self, "widest", max(self.widest, stop - start))
        return super().rows(start, stop)


@pytest.mark.parametrize(
    ("scorer", "shape"),
    [(Principal(4), (300, 40_000)), (Principal(4), (832, 16_384)), (Magnitude(), (300, 40_000))],
    ids=["gram", "krylov", "magnitude"],
)
def test_no_more_than_a_tile_is_read_at_once(scorer: Scorer, shape: tuple[int, int]) -> None:
    m, n = shape
    tiles = NarrowTiles(torch.randn(m, 1) @ torch.randn(1, n).sign())
    assert select(tiles, scorer, 1000).numel() == 1000
    assert 0 < tiles.widest < m


def test_counts_by_density_and_by_rank() -> None:
    assert count_by_density((4096, 11008), 0.05) == 2_254_438
    assert count_by_density((3, 7), 0.05) == 1
    assert count_by_rank((4096, 11008), 8) == 120_832
