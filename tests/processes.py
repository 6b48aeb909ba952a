"""Python in a process of its own, which is for what a process decides: what is imported, who is
killed, whose locks are whose. All else is tested in the process of the tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The repository."""
PLACES = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": PLACES, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip


def run_python(
    *arguments: str, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` with this repository's leanlift; what it wrote, and its exit code.

    Args:
        arguments: as after `python`.
        cwd: where it runs.
        environment: what is set beside the present environment.
    """
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd, env={**ENVIRONMENT, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def free_port() -> int:
    """One that nobody listens at now."""
    with socket.socket() as held:
        held.bind(("localhost", 0))
        return int(held.getsockname()[1])
