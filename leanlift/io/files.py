"""Files that are either whole or absent, and JSON within bounds.

Everything leanlift writes goes to a temporary name beside its destination and is renamed when
whole, so a kill at any moment leaves the old state or the new one. Nothing here needs torch: what
only reads or writes text starts at once.
"""

from __future__ import annotations

import ctypes
import glob
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from leanlift.errors import UserError
from leanlift.io.bounded import MOST_BYTES, parse_bounded, read_bounded


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_partials(path.parent, path.name)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        give_usual_mode(temporary)
        _sync(temporary)
        os.replace(temporary, path)
        sync_directory(path.parent)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def check_new(path: Path) -> None:
    """Refuse a place for a new directory that is taken; an empty directory is not.

    Raises:
        UserError: it is.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} already exists and is not empty: choose another output directory.")


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; rename it to `path` if the block succeeds.

    Raises:
        UserError: `path` exists and is not an empty directory.
    """
    check_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_partials(path.parent, path.name)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
        try:
            if path.exists():  # empty, as was seen above; Windows renames onto no directory
                path.rmdir()
            os.replace(temporary, path)
        except OSError:
            if not (path.is_dir() and any(path.iterdir())):
                raise
            raise UserError(
                f"another process has written {path} meanwhile: what it wrote was kept."
            ) from None
        sync_directory(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_partials(directory: Path, name: str | None = None) -> None:
    """Delete what killed processes have left half-written in `directory`: of the file or directory
    `name`, or of any. What a live process is writing stays."""
    stem = "*" if name is None else glob.escape(name)
    for left in list(directory.glob(f".{stem}.*.partial")):
        owner = left.name.split(".")[-2]
        if not owner.isdigit() or (int(owner) != os.getpid() and is_running(int(owner))):
            continue
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            with suppress(OSError):
                left.unlink()


def is_running(process: int) -> bool:
    """Whether there is a process of this number on this machine; True where that cannot be told."""
    if sys.platform == "win32":  # os.kill(process, 0) would send it a Ctrl-C there
        kernel = ctypes.WinDLL("kernel32", use_last_error=True)
        handle = kernel.OpenProcess(0x1000, False, process)  # PROCESS_QUERY_LIMITED_INFORMATION
        if not handle:
            return ctypes.get_last_error() == 5  # ERROR_ACCESS_DENIED: somebody else's
        code = ctypes.c_ulong()
        known = kernel.GetExitCodeProcess(handle, ctypes.byref(code))
        kernel.CloseHandle(handle)
        return not known or code.value == 259  # STILL_ACTIVE
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's
        return True
    return True


def digest_of(file: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def sync_tree(directory: Path) -> None:
    """Make sure that every file of a directory is on the disk before it is renamed."""
    for file in directory.rglob("*"):
        if file.is_file():
            _sync(file)


def write_json(path: Path, data: Any) -> None:
    """Write JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path, most: int = MOST_BYTES) -> Any:
    """Parsed JSON of a regular file of at most `most` bytes.

    Raises:
        UserError: missing, unreadable, cut off in the middle, or beyond the bounds of
            `leanlift.io.bounded`.
    """
    try:
        return parse_bounded(read_bounded(path, most))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: is the directory the right one?") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None
    except ValueError as error:  # cut off, no UTF-8, numbers or nesting without end
        raise UserError(f"{path} is not valid JSON ({error}): it may be truncated.") from None


def give_usual_mode(path: Path) -> None:
    """That of a new file: safetensors makes files that only their owner may read."""
    path.chmod(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)  # Windows syncs only what is open for writing
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_directory(directory: Path) -> None:
    """Make sure that a rename inside `directory` is on the disk, where a system can do that."""
    with suppress(OSError):  # Windows opens no directory
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
