"""The comparison of screens, compared."""

from __future__ import annotations

from pathlib import Path

import pytest
import snapshots


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "SCREENS", tmp_path)
    (tmp_path / "one.txt").write_text("took SECONDS\nhere\n", encoding="utf-8")


def test_a_screen_is_compared_whole() -> None:
    varies = {r"\d+\.\d s": "SECONDS"}
    snapshots.assert_screen("took 1.3 s\nhere  \n", "one", varies)
    for other in ("took 1.3 s\n", "took 1.3 s\nthere\n", "took 1.3 min\nhere\n", ""):
        with pytest.raises(AssertionError, match="shown"):
            snapshots.assert_screen(other, "one", varies)
    with pytest.raises(AssertionError, match="shown"):
        snapshots.assert_screen("anything\n", "not there yet")


def test_a_screen_has_80_columns_and_no_colour(tmp_path: Path) -> None:
    (tmp_path / "wide.txt").write_text("x" * 81 + "\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="wider than 80"):
        snapshots.assert_screen("x" * 81, "wide")
    with pytest.raises(AssertionError, match="control characters"):
        snapshots.assert_screen("\x1b[31mred\x1b[0m", "wide")
    (tmp_path / "path.txt").write_text("in DIR\n", encoding="utf-8")
    snapshots.assert_screen("in " + "/long" * 20, "path", {"(/long)+": "DIR"})


def test_screens_are_written_anew_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPDATE_SCREENS", "1")
    snapshots.assert_screen("new\n", "new")
    monkeypatch.delenv("UPDATE_SCREENS")
    snapshots.assert_screen("new\n", "new")
