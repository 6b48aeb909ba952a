"""Runs that cover each pair of settings, and that their plans hold."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plan_combined import NEEDS, SETTINGS, covering_runs, pairs, settings_of
from benchmarks.plan_peak import row, write_base, write_rows_file


def test_any_two_settings_are_on_together_alone_and_off() -> None:
    runs = covering_runs()
    seen = {pair for on in runs for pair in pairs(on, tuple(SETTINGS))}
    for one in SETTINGS:
        for other in SETTINGS:
            if list(SETTINGS).index(one) < list(SETTINGS).index(other):
                assert (one, True, other, True) in seen
                assert (one, False, other, False) in seen
                assert ((one, True, other, False) in seen) == (other not in NEEDS.get(one, ()))
                assert ((one, False, other, True) in seen) == (one not in NEEDS.get(other, ()))
    assert len(runs) < 12
    assert all(set(NEEDS.get(name, ())) <= on for on in runs for name in on)


def planned_and_measured(on: frozenset[str], work: Path) -> dict[str, Any]:
    write_base(work / "base", 64, 3)
    write_rows_file(work / "rows.jsonl", 256)
    return row("", settings_of(on), work, argparse.Namespace(device="cpu", length=256))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")
def test_a_run_with_nearly_all_of_them_peaks_where_it_was_planned(tmp_path: Path) -> None:
    most = max(covering_runs(), key=len)
    assert len(most) == len(SETTINGS) - 1, "kept and reused go together elsewhere"
    found = planned_and_measured(most, tmp_path)
    assert found["planned"] == pytest.approx(found["measured"], rel=0.01)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")
@pytest.mark.parametrize("number", range(len(covering_runs())))
def test_combined_settings_peak_where_they_were_planned(number: int, tmp_path: Path) -> None:
    found = planned_and_measured(covering_runs()[number], tmp_path)
    assert found["planned"] == pytest.approx(found["measured"], rel=0.01)
