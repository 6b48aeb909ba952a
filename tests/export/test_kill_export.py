"""A merge that is killed, or whose disk is full, leaves a whole output or none."""

from __future__ import annotations

import os

import pytest
from processes import run_python


@pytest.mark.thorough
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_an_interrupted_merge_leaves_a_whole_output_or_none() -> None:
    result = run_python("-m", "benchmarks.kill_export", "--kills", "5", "--no_csv")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "5 interruptions: every output is whole or absent" in result.stdout
    assert "ended killed" in result.stdout
    assert "ended failed to write" in result.stdout
