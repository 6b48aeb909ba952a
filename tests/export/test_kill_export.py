"""A merge that is killed, or whose disk is full, leaves a whole output or none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from processes import run_python
from trained import trained

from leanlift import UserError, merge_adapter


@pytest.mark.thorough
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_an_interrupted_merge_leaves_a_whole_output_or_none() -> None:
    result = run_python("-m", "benchmarks.kill_export", "--kills", "5", "--no_csv")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "5 interruptions: every output is whole or absent" in result.stdout
    assert "ended killed" in result.stdout
    assert "ended failed to write" in result.stdout


def test_a_write_that_fails_leaves_no_output(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever write of a merge it is that the disk has no room for."""
    trained(base, tmp_path / "adapter")
    real, failed = os.fsync, 0
    said: list[str] = []

    def merged_but_for(number: int) -> bool:
        left = number

        def fsync(handle: int) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(28, "No space left on device")
            real(handle)

        with monkeypatch.context() as inside:
            inside.setattr(os, "fsync", fsync)
            try:
                merge_adapter(tmp_path / "adapter", tmp_path / "merged", progress=False)
            except (OSError, UserError) as error:
                said.append(str(error))
                return False
        return True

    while not merged_but_for(failed):
        failed += 1
        assert os.listdir(tmp_path) == ["adapter"], failed
    assert failed >= 3
    assert all("No space left on device" in text for text in said)
    assert (tmp_path / "merged" / "model.safetensors").is_file()
