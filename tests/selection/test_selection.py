"""Selection: an exact streamed top-k, and masks that agree with a float64 SVD."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import (
    examples,
    low_rank_oracle,
    make_base,
    make_linear4bit,
    overlap,
    principal_oracle,
    random_weight,
    top_oracle,
    trained_like,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leanlift.errors import UserError
from leanlift.memory import LiveBytes
from leanlift.quantized import frozen_weight
from leanlift.selection import (
    Gradient,
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
from leanlift.selection.lowrank import LowRank, gram_factors, krylov_factors
from leanlift.selection.topk import StreamedTopK, topk_nbytes
from leanlift.tiles import DEFAULT_TILE_BYTES, DenseTiles, RowTiles

SHAPES = [(192, 192), (320, 128), (128, 320), (257, 131)]
RANK = 16


def _shape_id(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


each_shape = pytest.mark.parametrize("shape", SHAPES, ids=_shape_id)
each_route = pytest.mark.parametrize("route", ["gram", "krylov"])


def _factors(route: str, tiles: RowTiles, rank: int, count: int) -> LowRank:
    if route == "gram":
        return gram_factors(tiles, rank, 2**20)
    return krylov_factors(tiles, rank, count, 2**20, tolerance=1e-4, max_steps=30, seed=0)


def _mask(factors: LowRank, m: int, count: int) -> Tensor:
    return top_oracle(factors.scores(0, m), count)


# --- the streamed top-k ---------------------------------------------------------------------

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


@pytest.mark.parametrize("route", ["gram", "gram-wide", "krylov", "krylov-int8"])
@pytest.mark.parametrize("scorer", [Principal(rank=16), Magnitude(), Random()], ids=type)
def test_a_mask_does_not_depend_on_the_size_of_the_tiles(scorer: Scorer, route: str) -> None:
    """Bit for bit: what is read at once is not what is computed at once."""
    m, n = {"gram": (1300, 300), "gram-wide": (700, 900)}.get(route, (1300, 800))
    weight = trained_like(m, n)
    tiles = frozen_weight(make_base("int8", m, n)) if "int8" in route else DenseTiles(weight)
    masks = [selection(tiles, scorer, 9000, tile_bytes=1 << bits).flat for bits in (10, 21, 30)]
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("shape", [(1300, 800), (600, 2100), (300, 3000)], ids=_shape_id)
@pytest.mark.parametrize(
    "scorer",
    [Principal(rank=16), Principal(rank=100), Principal(rank=16, block=4), Magnitude(), Random()],
    ids=["rank-16", "rank-100", "blocks", "magnitude", "random"],
)
@pytest.mark.parametrize("bits", [16, 25], ids=["small-tiles", "default-tiles"])
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


# --- principal weights ----------------------------------------------------------------------


@each_route
@each_shape
@pytest.mark.parametrize("density", [0.01, 0.05])
def test_factors_give_the_mask_of_a_float64_svd(
    route: str, shape: tuple[int, int], density: float
) -> None:
    weight, (m, n) = trained_like(*shape), shape
    count = int(density * m * n)
    factors = _factors(route, DenseTiles(weight), RANK, count)
    assert factors.converged
    assert overlap(_mask(factors, m, count), principal_oracle(weight, RANK, count)) >= 0.999


@pytest.mark.parametrize("shape", [(400, 300), (300, 400)], ids=_shape_id)
def test_krylov_converges_through_several_restarts(shape: tuple[int, int]) -> None:
    """A slow spectrum and a small block: the first cycle of five steps is not enough."""
    weight, (m, n) = trained_like(*shape, exponent=0.2), shape
    count = m * n // 20
    factors = _factors("krylov", DenseTiles(weight), 8, count)
    assert overlap(_mask(factors, m, count), principal_oracle(weight, 8, count)) >= 0.999
    assert factors.converged
    assert factors.steps <= 15


def test_a_matrix_beyond_the_gram_side_gives_the_mask_of_a_float64_svd() -> None:
    """832 x 1000 takes the Krylov route."""
    weight, count = trained_like(832, 1000), count_by_density((832, 1000), 0.05)
    found = selection(weight, Principal(rank=64), count)
    assert overlap(found.flat, principal_oracle(weight, 64, count)) >= 0.999
    assert found.converged


@each_shape
def test_principal_takes_the_largest_entries_of_the_approximation(shape: tuple[int, int]) -> None:
    """Not the smallest, and not the largest of W itself."""
    weight = trained_like(*shape)
    scores = low_rank_oracle(weight, 4).abs().view(-1)
    taken = torch.zeros(scores.numel(), dtype=torch.bool)
    taken[select(weight, Principal(rank=4), scores.numel() // 20)] = True
    assert float(scores[taken].min()) >= 0.9999 * float(scores[~taken].max())
    assert float(scores[taken].mean()) > 3 * float(scores[~taken].mean())
    magnitude = select(weight, Magnitude(), scores.numel() // 20)
    assert float(taken[magnitude].float().mean()) < 0.9


@each_route
@pytest.mark.parametrize("true_rank", [1, 5, RANK])
def test_an_exactly_low_rank_matrix_is_its_own_approximation(route: str, true_rank: int) -> None:
    weight = torch.randn(160, true_rank) @ torch.randn(true_rank, 210)
    factors = _factors(route, DenseTiles(weight), RANK, 1000)
    assert factors.converged
    torch.testing.assert_close(factors.left @ factors.right.T, weight, rtol=1e-4, atol=1e-4)
    assert overlap(_mask(factors, 160, 1000), top_oracle(weight.abs(), 1000)) >= 0.999


@pytest.mark.parametrize("rank", [48, 49, 1000])
def test_a_full_rank_approximation_is_magnitude(rank: int) -> None:
    weight = random_weight(65, 48)
    expected = top_oracle(weight.abs(), 300)
    assert torch.equal(select(weight, Principal(rank=rank), 300), expected)
    assert torch.equal(select(weight, Magnitude(), 300), expected)


@each_route
@pytest.mark.parametrize("spectrum", ["flat", "no-gap-at-rank"])
def test_an_approximation_that_is_not_unique_is_reported(route: str, spectrum: str) -> None:
    left, right = torch.linalg.qr(torch.randn(2, 160, 160)).Q
    sigma = torch.ones(160) if spectrum == "flat" else torch.linspace(4, 1, 160)
    sigma[RANK] = sigma[RANK - 1]
    factors = _factors(route, DenseTiles((left * sigma) @ right.T), RANK, 1000)
    assert not factors.converged
    assert not selection(torch.eye(100), Principal(rank=RANK), 50).converged


def test_too_few_steps_are_reported() -> None:
    tiles = DenseTiles(trained_like(300, 400))
    factors = krylov_factors(tiles, RANK, 6000, 2**20, tolerance=1e-4, max_steps=2, seed=0)
    assert (factors.converged, factors.steps) == (False, 2)


@each_route
def test_a_zero_matrix_gives_the_lowest_positions(route: str) -> None:
    factors = _factors(route, DenseTiles(torch.zeros(100, 90)), RANK, 50)
    assert float(factors.scores(0, 100).max()) == 0.0
    for scorer in (Principal(rank=4), Magnitude()):
        assert select(torch.zeros(100, 90), scorer, 123).tolist() == list(range(123))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_quantized_base_gives_the_mask_of_its_dequantized_rows(quant_type: str) -> None:
    module = make_linear4bit(192, 250, quant_type, weight=trained_like(192, 250))
    tiles = frozen_weight(module)
    dense, count = tiles.rows(0, 192), count_by_density((192, 250), 0.05)
    found = select(tiles, Principal(rank=RANK), count)
    assert torch.equal(found, select(dense, Principal(rank=RANK), count))
    assert overlap(found, principal_oracle(dense, RANK, count)) >= 0.999


# --- random ---------------------------------------------------------------------------------


def _hash_24(position: int, seed: int) -> int:
    """The upper 24 bits of splitmix64 (Steele, Lea, Flood 2014), in Python integers."""

    def mix(z: int) -> int:
        z = z * 0x9E3779B97F4A7C15 % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    return mix(position + mix(seed)) >> 40


def test_random_is_the_same_on_every_machine_and_differs_by_seed() -> None:
    weight = torch.zeros(200, 300)
    flat = select(weight, Random(seed=3), 6000)
    assert torch.equal(flat, select(torch.randn(200, 300), Random(seed=3), 6000))
    expected = top_oracle(torch.tensor([_hash_24(position, 3) for position in range(60_000)]), 6000)
    assert torch.equal(flat, expected)
    other = select(weight, Random(seed=4), 6000)
    assert 0.05 < overlap(other, flat) < 0.15


def test_random_is_uniform_over_rows_and_columns() -> None:
    """Counts per line are nearly binomial with p = 0.2."""
    flat = select(torch.zeros(200, 300), Random(), 12_000)
    for line, lines in ((flat // 300, 200), (flat % 300, 300)):
        mean = 12_000 / lines
        counts = torch.bincount(line, minlength=lines).float()
        deviation = (mean * (1 - 0.2)) ** 0.5
        assert float((counts - mean).abs().max()) < 5 * deviation
        assert 0.7 * deviation < float(counts.std()) < 1.3 * deviation


# --- blocks and gradients -------------------------------------------------------------------


def test_block_structured_takes_whole_blocks_with_the_largest_sums() -> None:
    weight, (m, n), side = trained_like(64, 96), (64, 96), 4
    flat = select(weight, Principal(rank=8, block=side), 1000)
    scores = low_rank_oracle(weight, 8).abs().view(m // side, side, n // side, side).sum((1, 3))
    wanted = torch.zeros(m // side, n // side, dtype=torch.bool)
    wanted.view(-1)[top_oracle(scores, 1000 // side**2)] = True
    expected = wanted.repeat_interleave(side, 0).repeat_interleave(side, 1)
    assert torch.equal(flat, expected.view(-1).nonzero().squeeze(1))
    assert flat.numel() == 1000 // side**2 * side**2


def test_blocks_that_do_not_divide_the_matrix_are_refused() -> None:
    with pytest.raises(UserError, match="is 65x48, which blocks of 4x4 do not divide"):
        select(random_weight(65, 48), Principal(rank=8, block=4), 100)


def test_gradient_takes_the_largest_of_the_gradient() -> None:
    weight, gradient = random_weight(65, 48), random_weight(65, 48).neg()
    assert torch.equal(select(weight, Gradient(gradient), 99), select(gradient, Magnitude(), 99))
    with pytest.raises(ValueError, match="expected a gradient of shape"):
        select(weight, Gradient(gradient.T), 99)


def test_the_random_mask_is_the_same_on_every_machine() -> None:
    """Fixed numbers: integer hashing does not depend on hardware."""
    assert select(torch.zeros(8, 8), Random(seed=0), 6).tolist() == [4, 10, 23, 30, 31, 59]


def test_a_wrong_guess_at_the_threshold_costs_time_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All that matters lies in rows that the guess does not look at, or nothing does."""
    weight = random_weight(2048, 2048)
    weight[::64] *= 1e-3  # the sampled rows say: everything is small
    few = top_oracle(weight.abs(), 5000)
    assert torch.equal(select(weight, Magnitude(), 5000), few)
    loud = random_weight(2048, 2048) * 1e-3
    loud.view(256, 8, 2048)[::8] *= 1e3  # the sampled rows say: everything is large
    assert torch.equal(select(loud, Magnitude(), 2**21), top_oracle(loud.abs(), 2**21))


def test_a_block_that_runs_out_of_rank_gives_the_exact_mask() -> None:
    """Rank 40 in blocks of 24: the second block is part noise, which must not pass for signal."""
    left, right = random_weight(1024, 40), random_weight(40, 4096)
    weight = (left * torch.arange(1, 41) ** -0.6) @ right
    count = count_by_density((1024, 4096), 0.05)
    factors = _factors("krylov", DenseTiles(weight), RANK, count)
    exact = _factors("gram", DenseTiles(weight), RANK, count)
    assert factors.converged
    assert overlap(_mask(factors, 1024, count), _mask(exact, 1024, count)) >= 0.999


def test_more_equal_singular_values_than_a_block_is_wide_are_all_found() -> None:
    """A Krylov space that starts from b columns sees only b of them at first."""
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(1100, 100, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(900, 100, generator=generator)).Q
    flat_head = 10 * left @ right.T
    noise = 0.01 * torch.randn(1100, 900, generator=generator)
    for weight in (flat_head, flat_head + noise):
        found = krylov_factors(DenseTiles(weight), 100, 50_000, 2**20, 2.5e-4, 100, 0)
        u, sigma, vh = torch.linalg.svd(weight.double(), full_matrices=False)
        best = (u[:, :100] * sigma[:100]) @ vh[:100]
        assert found.converged
        assert (found.left @ found.right.T - best).norm() <= 1e-4 * best.norm()


# --- extreme scales ------------------------------------------------------------------------

ROUTES = {"krylov": (1024, 1536), "gram": (512, 700)}


def with_spike(weight: Tensor, ratio: float, kind: str) -> Tensor:
    """One more singular value, `ratio` times the largest, all over the matrix, in one row, or in
    one entry."""
    m, n = weight.shape
    generator = torch.Generator().manual_seed(3)
    u = torch.randn(m, generator=generator, dtype=torch.float64)
    v = torch.randn(n, generator=generator, dtype=torch.float64)
    if kind != "everywhere":
        u = torch.zeros_like(u).index_fill_(0, torch.tensor([5]), 1.0)
    if kind == "entry":
        v = torch.zeros_like(v).index_fill_(0, torch.tensor([7]), 1.0)
    size = ratio * torch.linalg.matrix_norm(weight.double(), 2)
    return (weight.double() + size * torch.outer(u / u.norm(), v / v.norm())).float()


@pytest.mark.parametrize("route", ROUTES)
def test_a_mask_does_not_depend_on_the_scale_of_the_matrix(route: str) -> None:
    weight = trained_like(*ROUTES[route])
    count = weight.numel() // 20
    usual = select(weight, Principal(64), count)
    assert overlap(usual, principal_oracle(weight, 64, count)) >= 0.999
    for exponent in (-110, -60, -50, 27, 60, 110):  # exact in fp32
        found = selection(torch.ldexp(weight, torch.tensor(exponent)), Principal(64), count)
        assert found.converged
        assert torch.equal(found.flat, usual), exponent
        magnitude = select(torch.ldexp(weight, torch.tensor(exponent)), Magnitude(), count)
        assert torch.equal(magnitude, select(weight, Magnitude(), count))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", ["everywhere", "row", "entry"])
@pytest.mark.parametrize("ratio", [1e4, 1e6])
def test_spikes_give_the_right_mask_or_are_reported(route: str, kind: str, ratio: float) -> None:
    weight = with_spike(trained_like(*ROUTES[route]), ratio, kind)
    count = weight.numel() // 20
    found = selection(weight, Principal(64), count)
    assert found.flat.numel() == count
    right = overlap(found.flat, principal_oracle(weight, 64, count)) >= 0.999
    assert right or not found.converged
    if kind == "everywhere":  # whose entries are all of one size: nothing is lost
        assert right
        assert found.converged


@pytest.mark.parametrize("route", ROUTES)
def test_rows_of_all_sizes_give_as_many_entries_as_asked_for(route: str) -> None:
    m, n = ROUTES[route]
    sizes = torch.logspace(-20, 20, m, dtype=torch.float64).unsqueeze(1)
    weight = (trained_like(m, n).double() * sizes).float()
    count = weight.numel() // 20
    found = selection(weight, Principal(64), count)
    assert found.flat.numel() == count
    assert overlap(found.flat, principal_oracle(weight, 64, count)) >= 0.999
    assert selection(torch.zeros(m, n), Principal(64), count).flat.numel() == count


def test_scores_that_cannot_be_ranked_are_refused() -> None:
    class Broken:
        block = 1

        def prepare(self, tiles: Any, count: int, tile_bytes: int) -> Any:
            return self

        converged, resolution = True, 0.0

        def scores(self, start: int, stop: int) -> Tensor:
            return torch.full((stop - start, 8), float("nan"))

    with pytest.raises(UserError, match=r"gave 0 entries instead of 4"):
        select(torch.randn(8, 8), Broken(), 4)  # type: ignore[arg-type]
