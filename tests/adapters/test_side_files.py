"""Files beside an adapter, damaged at random: a result or one sentence from every command."""

from __future__ import annotations

from pathlib import Path

import pytest
from sweeps import swept

from benchmarks.fuzz_side_files import fuzz


@pytest.mark.filterwarnings("ignore")  # what libraries say of the damage
@pytest.mark.parametrize("count", swept([5, 40], 5))
def test_a_few_damaged_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    found = fuzz(count, 1, tmp_path)
    assert sum(sum(counts.values()) for counts in found.values()) == count
    assert all(counts["failed"] == 0 for counts in found.values()), capsys.readouterr().out
    assert any(counts["refused"] for counts in found.values())
