"""One run at a time in an output directory.

Two runs in one directory would rotate away each other's checkpoints. The lock is the operating
system's, on a file that says who holds it: it is gone with the process that held it, however that
ended, so a run that was killed can go on at once, also on another machine of a cluster. Where a
file system has no locks, the process number in the file decides, for processes of this machine.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from leanlift.adapters import check_adapter_place
from leanlift.errors import UserError
from leanlift.io.tensors import is_running

logger = logging.getLogger("leanlift")

LOCK_NAME = ".lock"
FAR = 2**20
"""Where Windows locks a byte: what is locked there cannot be read."""


class OutputLock:
    """A context in which this process alone writes into `directory`; within itself it is free.

    Args:
        directory: made if it is not there, and taken away again if nothing was written.

    Raises:
        UserError: another process writes there, or the directory cannot be made.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.path = self.directory / LOCK_NAME
        self._handle: int | None = None
        self._made: list[Path] = []

    def __enter__(self) -> OutputLock:
        places = (self.directory, *self.directory.parents)
        self._made = [place for place in places if not place.exists()]
        make_output(self.directory)
        try:
            while self._handle is None and not self._try():
                pass
        except OSError as error:
            raise _cannot_be_written(self.directory, error) from None
        return self

    def _try(self) -> bool:
        """Take the lock, or find that this process has it; False where the file was replaced."""
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        locked = _lock(handle)
        if locked and not self._is_the_file(handle):
            os.close(handle)
            return False
        owner = self._owner()
        mine = owner == _identity()
        if locked is False or (locked is None and owner and not mine):
            os.close(handle)
            if mine:
                return True
            self._refuse_the_living(owner)
            self.path.unlink(missing_ok=True)  # a child of a dead process still holds the old file
            return False
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps(_identity()).encode())
        self._handle = handle
        return True

    def _refuse_the_living(self, owner: dict[str, Any]) -> None:
        here, process = owner.get("host") == _identity()["host"], owner.get("process")
        if here and isinstance(process, int) and not is_running(process):
            return
        raise UserError(
            f"another run, process {process} on {owner.get('host')}, is writing into "
            f"{self.directory}: choose another output_dir, wait for its end, or delete {self.path} "
            "if there is none."
        )

    def _owner(self) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_bytes() or b"{}")
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _is_the_file(self, handle: int) -> bool:
        """Whether what was opened is still what stands under the name."""
        try:
            return os.path.samestat(os.fstat(handle), self.path.stat())
        except FileNotFoundError:
            return False

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        if sys.platform == "win32":  # which deletes nothing that is open
            os.close(handle)
            _delete(self.path)
        else:
            _delete(self.path)
            os.close(handle)
        for place in self._made:
            try:
                place.rmdir()
            except OSError:
                return  # not empty


def make_output(directory: str | Path) -> None:
    """Make an output directory, where it is not there.

    Raises:
        UserError: it cannot be made, or is no place for an adapter.
    """
    check_adapter_place(directory)
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_be_written(directory, error) from None


def _cannot_be_written(directory: str | Path, error: OSError) -> UserError:
    return UserError(
        f"output_dir {directory} cannot be written to ({error.strerror}): choose another one."
    )


def _delete(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        logger.debug("%s is left behind; it is not locked", path)


def _identity() -> dict[str, Any]:
    return {"process": os.getpid(), "host": socket.gethostname()}


def _lock(handle: int) -> bool | None:
    """Whether the lock was free and is now ours; None where the file system has no locks."""
    if sys.platform == "win32":
        import msvcrt

        try:
            os.lseek(handle, FAR, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            os.lseek(handle, 0, os.SEEK_SET)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
