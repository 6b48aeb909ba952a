"""The command line in the process of the tests."""

from __future__ import annotations

import pytest

from leanlift.cli import main


def complaint(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one sentence of a refused command."""
    capsys.readouterr()
    assert main(argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("leanlift: ")]
    assert len(lines) == 1
    assert lines[0].endswith((".", "?"))
    return lines[0]
