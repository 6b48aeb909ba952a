"""A safetensors file read by numpy: its header as JSON within bounds, its tensors one at a time.

The library would do, but its torch reader costs seconds of imports, and its numpy reader has no
bfloat16. Nothing is allocated that the file does not hold.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from leanlift.errors import UserError
from leanlift.io.bounded import parse_bounded

LONGEST_HEADER = 64 * 2**20
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Spec:
    """Where a tensor lies: its dtype by the format's name, its shape, its bytes from `start`."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def count(self) -> int:
        """Entries of the tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * WIDTHS[self.dtype]


@dataclass(frozen=True)
class Tensors:
    """An open file."""

    path: Path
    specs: dict[str, Spec]
    _file: BinaryIO

    def count_of(self, name: str) -> int:
        """Numbers in a tensor, by the header.

        Raises:
            UserError: it is not there.
        """
        return self._spec(name).count

    def floats(self, name: str) -> np.ndarray:
        """A floating tensor, flat, in fp32.

        Raises:
            UserError: it is not there, is none, or holds NaN or infinite numbers.
        """
        spec = self._spec(name)
        if spec.dtype not in FLOATS or len(spec.shape) != 1:
            raise UserError(
                f"{name} in {self.path} is {spec.dtype} {list(spec.shape)}; expected a 1-D "
                "floating tensor."
            )
        raw = self._read(spec, {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[spec.dtype])
        if spec.dtype == "BF16":  # the upper half of an fp32 number
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        values = raw.astype(np.float32, copy=False)
        if not np.isfinite(values).all():
            raise UserError(f"{name} in {self.path} holds NaN or infinite offsets.")
        return values

    def bytes_of(self, name: str) -> np.ndarray:
        """A uint8 tensor in its shape.

        Raises:
            UserError: it is not there, or none.
        """
        spec = self._spec(name)
        if spec.dtype != "U8":
            raise UserError(f"{name} in {self.path} is {spec.dtype}; expected uint8.")
        return self._read(spec, "u1").reshape(spec.shape)

    def _spec(self, name: str) -> Spec:
        if name not in self.specs:
            raise UserError(f"{self.path} lacks {name}: it is not whole.")
        return self.specs[name]

    def _read(self, spec: Spec, dtype: str) -> np.ndarray:
        self._file.seek(spec.start)
        found = np.fromfile(self._file, dtype=dtype, count=spec.count)
        if found.size != spec.count:
            raise UserError(f"{self.path} ends in the middle of a tensor: fetch it again.")
        return found


@contextmanager
def open_by_numpy(path: Path) -> Iterator[Tensors]:
    """Open a safetensors file that anyone may have written.

    Raises:
        UserError: missing, cut off, or no such file.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: is the directory the right one?")
    try:
        with path.open("rb") as file:
            yield Tensors(path, _header(file), file)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is not a whole safetensors file ({error}): it may be truncated or only half "
            "downloaded; fetch it again."
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None


def _header(file: BinaryIO) -> dict[str, Spec]:
    """What the file says it holds; raises a ValueError for anything that it cannot."""
    import os

    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no regular file")
    length = int.from_bytes(file.read(8), "little")
    if found.st_size < 8 or length > min(LONGEST_HEADER, found.st_size - 8):
        raise ValueError("its header does not fit in it")
    data = parse_bounded(file.read(length).decode("utf-8"))
    if not isinstance(data, dict):
        raise ValueError("its header is no object")
    begin, room = 8 + length, found.st_size - 8 - length
    named = {name: entry for name, entry in data.items() if name != "__metadata__"}
    return {name: _spec(name, entry, begin, room) for name, entry in named.items()}


def _spec(name: str, entry: Any, begin: int, room: int) -> Spec:
    entry = entry if isinstance(entry, dict) else {}
    shape, offsets, dtype = entry.get("shape"), entry.get("data_offsets"), entry.get("dtype")
    if not (
        isinstance(shape, list)
        and len(shape) <= 8
        and isinstance(dtype, str)
        and dtype in WIDTHS
        and isinstance(offsets, list)
        and len(offsets) == 2
        and all(type(size) is int and 0 <= size <= 2**40 for size in (*shape, *offsets))
    ):
        raise ValueError(f"its header says nothing usable of {name[:80]!r}")
    spec = Spec(dtype, tuple(shape), begin + offsets[0])
    if spec.nbytes != offsets[1] - offsets[0] or offsets[1] > room:
        raise ValueError(f"{name[:80]!r} does not lie in it")
    return spec
