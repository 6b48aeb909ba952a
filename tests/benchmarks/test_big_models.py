"""Large models of many kinds are planned from the configurations that they are published with."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.big_models import GIB, MODELS, planned


@pytest.mark.thorough
@pytest.mark.parametrize("name", MODELS)
def test_a_plan_has_the_weights_that_are_published(name: str, tmp_path: Path) -> None:
    _, plan = planned(name, tmp_path)
    in_16_bits = 2 * plan.weights
    assert plan.categories["base weights"] < in_16_bits / 3
    assert plan.phases["load"] < in_16_bits  # experts are never there whole
    assert 0.03 < plan.entries / plan.weights < 0.05
    assert plan.peak < 0.6 * in_16_bits + 4 * GIB
