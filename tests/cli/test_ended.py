"""A command that is told to end leaves nothing half-written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WRITES = """
import os, signal
from pathlib import Path
import leanlift.cli
from leanlift.io.files import replacing

def main():
    with replacing(Path("out")) as partial:
        partial.write_text("half")
        os.kill(os.getpid(), signal.SIGTERM)
        partial.write_text("whole")

leanlift.cli.main = main
raise SystemExit(leanlift.cli.script())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process without asking it")
def test_sigterm_leaves_nothing_half_written(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WRITES], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 143, done.stderr
    assert not list(tmp_path.iterdir())
    assert not done.stderr
