"""One list of work for several processes: who marks a piece first does it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path


class Work:
    """Pieces of work by name.

    Args:
        directory: where pieces are marked; None: there is one process, and all is its own.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory

    def claim(self, name: str) -> bool:
        """Whether the piece is this process's to do."""
        return self.directory is None or self._mark(f"{name}.taken")

    def finish(self, name: str) -> None:
        if self.directory is not None:
            self._mark(f"{name}.done")

    def wait(self, names: Iterable[str]) -> None:
        """Until all of them are finished, by whomever."""
        for name in names:
            while self.directory is not None and not self._path(f"{name}.done").exists():
                time.sleep(1)

    def _path(self, mark: str) -> Path:
        assert self.directory is not None
        return self.directory / mark.replace("/", "_")

    def _mark(self, mark: str) -> bool:
        try:
            os.close(os.open(self._path(mark), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True


def run_jobs(jobs: int, module: str, arguments: list[str]) -> None:
    """`python -m module arguments` in so many processes; the first that fails ends all.

    Raises:
        SystemExit: with the code of the one that failed.
    """
    workers = [subprocess.Popen([sys.executable, "-m", module, *arguments]) for _ in range(jobs)]
    try:
        while any(worker.poll() is None for worker in workers):
            failed = next((w.returncode for w in workers if w.returncode), None)
            if failed:
                raise SystemExit(failed)
            time.sleep(1)
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait()
    failed = next((w.returncode for w in workers if w.returncode), None)
    if failed:
        raise SystemExit(failed)
