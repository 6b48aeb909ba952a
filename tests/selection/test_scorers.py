"""Random, block-structured and gradient masks."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    low_rank_oracle,
    overlap,
    random_weight,
    top_oracle,
    trained_like,
)

from leanlift.errors import UserError
from leanlift.selection import (
    Gradient,
    Magnitude,
    Principal,
    Random,
    select,
)


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
