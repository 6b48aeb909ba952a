"""Selection: an exact streamed top-k, and masks that agree with a float64 SVD."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    low_rank_oracle,
    make_linear4bit,
    overlap,
    principal_oracle,
    random_weight,
    top_oracle,
    trained_like,
)
from routes import RANK, _factors, _mask, _shape_id, each_route, each_shape
from sweeps import swept
from torch import Tensor

from leanlift.errors import UserError
from leanlift.selection import (
    Magnitude,
    Principal,
    count_by_density,
    select,
    selection,
)
from leanlift.selection.krylov import krylov_factors
from leanlift.tiles import DenseTiles
from leanlift.weights.quantized import frozen_weight

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


@pytest.mark.thorough
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


@pytest.mark.thorough
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


@pytest.mark.parametrize("route", swept(ROUTES, "gram"))
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
@pytest.mark.parametrize("kind", swept(["everywhere", "row", "entry"], "row"))
@pytest.mark.parametrize("ratio", swept([1e4, 1e6], 1e6))
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
