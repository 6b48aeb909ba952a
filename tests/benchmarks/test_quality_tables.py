"""Which runs a difference between two methods is made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.quality.real.compare import forgotten, learned
from benchmarks.quality.real.measure import Losses
from benchmarks.quality.real.plan import NF4, PRINCIPAL
from benchmarks.quality.real.run import BASES, TOKENS
from benchmarks.quality.real.store import Store, key_of
from benchmarks.quality.real.table import SETS, Results, tables

RATES, BEST = (1e-3, 3e-3, 1e-2), 3e-3
ROWS = 6


def add(store: Store, name: str, rate: float, seed: int, target: float, source: float) -> None:
    """A run whose rows all have these losses."""
    asked = {of: Losses([target if of == "test" else source] * ROWS, [True] * ROWS) for of in SETS}
    row = {
        "group": "base" if rate == 0 else "candidate", "form": NF4,
        "valid": abs(rate - BEST) + 1, "test": target, "prose": source, "code": source,
        "chat": source, "trained": 5, "note": "", "probes_right": 0.5, "step_ms": 1.0,
        "seconds": 1.0, "steps": 1, "batch": 1, "dtype": "float32",
    }  # fmt: skip
    store.add(key_of(0.05 if rate else 0, name, rate, seed), row, asked)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "results.csv")
    add(made, TOKENS, 0, 0, 1.0, 1.0)
    for name in BASES.values():
        add(made, name, 0, 0, 9.0, 4.0)
    for rate, more in zip(RATES, (1.0, 0.0, 2.0), strict=True):
        add(made, PRINCIPAL, rate, 0, 2.0 + more, 5.0)
        add(made, "one seed", rate, 0, 2.25 + more, 4.5)
    add(made, PRINCIPAL, BEST, 1, 4.0, 8.0)
    return made


def test_both_sides_of_a_difference_have_the_same_seeds(store: Store) -> None:
    results = Results(store, 20)
    ours, line = (results.lines["0.05"][name] for name in (PRINCIPAL, "one seed"))
    assert float(ours.measured.target[0, 1]) == 3.0, "the mean over its seeds"
    target = learned(*results.of_same_seeds(line, ours))
    assert target.value == pytest.approx(0.25)
    assert target.error == pytest.approx(0, abs=1e-9), "all rows are alike"
    # principal's curve goes from 3.0 to 2.0 at a rise of 1 throughout
    assert forgotten(*results.of_same_seeds(line, ours)).value == pytest.approx(0.5 - 1.0)
    add(store, "one seed", BEST, 1, 4.75, 9.0)
    again = Results(store, 20)
    ours, line = (again.lines["0.05"][name] for name in (PRINCIPAL, "one seed"))
    assert learned(*again.of_same_seeds(line, ours)).value == pytest.approx((0.25 + 0.75) / 2)


def test_a_sweep_that_is_not_finished_is_not_judged(store: Store) -> None:
    for rate in RATES[:2]:
        add(store, "begun", rate, 0, 8.0, 5.0)
    results = Results(store, 20)
    assert set(results.lines["0.05"]) == {PRINCIPAL, "one seed"}
    text = "\n".join(tables(results))
    assert "begun at 5.0%: its sweep is not finished" in text
    assert "| one seed |" in text
