"""The difference of two models on the same rows: against the plain formula, and a bootstrap."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from leanlift.format import change as words
from leanlift.paired import Change, change


def test_of_rows_of_one_length_it_is_the_paired_error_of_a_mean() -> None:
    chance = np.random.default_rng(1)
    before, after = chance.normal(3, 2, 50), chance.normal(3, 2, 50)
    found = change(list(before), list(after))
    differences = after - before
    assert found is not None
    assert found.error is not None
    assert math.isclose(found.mean, statistics.fmean(differences))
    assert math.isclose(found.error, statistics.stdev(differences) / math.sqrt(50))
    longer = change(list(before), list(after), [7] * 50)
    assert longer is not None
    assert longer.error is not None
    assert math.isclose(longer.mean * 7, found.mean)
    assert math.isclose(longer.error * 7, found.error)


@pytest.mark.parametrize("seed", range(3))
def test_of_rows_of_unlike_lengths_it_is_what_a_bootstrap_over_rows_gives(seed: int) -> None:
    chance = np.random.default_rng(seed)
    counts = chance.integers(1, 60, 300)
    hard = chance.normal(2.5, 1.0, 300)  # what both find: it must not show in the difference
    before = counts * hard
    after = counts * (hard + chance.normal(0.05, 0.2, 300)) + chance.normal(0, 0.5, 300)
    found = change(before.tolist(), after.tolist(), counts.tolist())
    drawn = chance.integers(0, 300, (4000, 300))
    means = (after - before)[drawn].sum(1) / counts[drawn].sum(1)
    assert found is not None
    assert found.error is not None
    assert math.isclose(found.mean, (after - before).sum() / counts.sum())
    assert found.error == pytest.approx(means.std(), rel=0.06)
    alone = np.sqrt((before / counts).var() + (after / counts).var()) / math.sqrt(300)
    assert found.error < alone / 2


def test_rows_that_count_for_nothing_and_rows_that_are_alone() -> None:
    assert change([1.0, 9.0, 2.0], [2.0, 0.0, 4.0], [1, 0, 2]) == change([1, 2], [2, 4], [1, 2])
    assert change([1.0], [3.0], [4]) == Change(0.5, None)
    assert change([], []) is None
    assert change([1.0], [1.0], [0]) is None
    assert change([1.0, 2.0], [3.0, 4.0], [4, 2], [7, 7]) == Change(4 / 6, None)
    with pytest.raises(ValueError, match="argument"):
        change([1.0], [1.0, 2.0])


def test_parts_of_a_row_are_not_independent_of_each_other() -> None:
    chance = np.random.default_rng(4)
    rows = np.repeat(np.arange(60), chance.integers(1, 6, 60))
    counts = chance.integers(1, 9, len(rows))
    after = counts * chance.normal(0.1, 0.3, 60)[rows]  # what a row does, all its parts do
    before, order = np.zeros(len(rows)), chance.permutation(len(rows))
    found = change(*(x[order].tolist() for x in (before, after, counts, rows)))
    whole = change(*(np.bincount(rows, x).tolist() for x in (before, after, counts)))  # type: ignore[arg-type]
    assert found is not None
    assert whole is not None
    assert found.error is not None
    assert found.mean == pytest.approx(whole.mean)
    assert found.error == pytest.approx(whole.error)
    apart = change(before.tolist(), after.tolist(), counts.tolist())
    assert apart is not None
    assert apart.error is not None
    assert apart.error < 0.8 * found.error


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_where_a_figure_is_not_finite_there_is_no_difference(wrong: float) -> None:
    for before, after in (([1.0, 1.0], [wrong, 1.0]), ([wrong, 1.0], [1.0, wrong])):
        found = change(before, after)
        assert found is not None
        assert math.isnan(found.mean)
        assert found.to_dict() == {"mean": None, "error": None}
    assert Change(0.5, None).to_dict() == {"mean": 0.5, "error": None}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((0.0412, 0.0119), "+0.041 ± 0.012"),
        ((-1.3349, 0.204), "-1.33 ± 0.20"),
        ((0.00001, 0.00002), "+0.0000 ± 0.0000"),
        ((12.3, 4.0), "+12.3 ± 4.0"),
        ((1234.5, 321.0), "+1,234 ± 321"),
        ((0.0, 0.0), "+0.00 ± 0.00"),
        ((0.5, None), "+0.500"),
        ((None, None), "–"),
        ((math.nan, 0.1), "–"),
    ],
    ids=str,
)
def test_a_change_in_words(given: tuple[float | None, float | None], said: str) -> None:
    assert words(*given) == said
