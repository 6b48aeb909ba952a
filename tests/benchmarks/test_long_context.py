"""The benchmark of long rows runs, on a small block, and its plans hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import long_context
from benchmarks.long_context import CASES, QUICK, rows_of


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")
def test_a_small_block_peaks_where_it_was_planned(tmp_path: Path) -> None:
    rows = {row["setting"]: row for row in rows_of(tmp_path, 4096, QUICK)}
    assert list(rows) == list(CASES)
    for row in rows.values():
        assert row["planned"] == pytest.approx(row["measured"], rel=0.05)
    assert rows["tiled_mlp"]["measured"] < 0.8 * rows["plain"]["measured"]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")
def test_a_short_row_peaks_where_it_was_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_context, "CASES", {"plain": CASES["plain"]})
    (row,) = rows_of(tmp_path, 256, QUICK)
    assert row["planned"] == pytest.approx(row["measured"], rel=0.05)
