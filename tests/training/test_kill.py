"""A run that is killed anywhere, its last files included, ends as if it never had been."""

from __future__ import annotations

import os

import pytest
from processes import run_python

PHASES = ("step", "refresh", "save", "rotation", "end")


@pytest.mark.thorough
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_a_killed_run_ends_with_the_same_bytes() -> None:
    result = run_python(
        "-m",
        "benchmarks.kill_resume",
        "--kills",
        "5",
        "--steps",
        "12",
        "--schedule",
        "constant",
        "--no_csv",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("the same bytes") == 6
    assert all(f"phase {phase}" in result.stdout for phase in PHASES)
