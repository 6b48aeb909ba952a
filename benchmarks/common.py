"""What every benchmark shares: machine and versions, CSV rows, timing."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, str]:
    """Commit, machine and library versions, for every row of every result."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "commit": _commit(),
        "device": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bitsandbytes": _version("bitsandbytes"),
        "transformers": _version("transformers"),
    }


def _commit() -> str:
    """Of this checkout; of a copy without git, what the variable COMMIT says."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True, text=True, check=False, cwd=RESULTS.parent,
        )  # fmt: skip
    except OSError:  # a machine without git
        return os.environ.get("COMMIT", "unknown")
    return done.stdout.strip() or os.environ.get("COMMIT", "unknown")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def write_rows(name: str, rows: list[dict[str, Any]], kept: Sequence[dict[str, str]] = ()) -> Path:
    """Write `results/<name>.csv`, environment columns last; first what is kept of earlier runs,
    with their environment."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    here = environment()
    rows = [*kept, *({**row, **here} for row in rows)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a result, environment and all; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """The function's result and its wall time in seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - started
