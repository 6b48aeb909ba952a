"""Tensors on disk, in files that are either whole or absent.

Tensors are stored as safetensors. `ShardedWriter` writes that format tensor by tensor, in row
slices, where the library would want all tensors of a file in memory at once; its files are read
back by the library like any other. What is true of any file (`leanlift.io.files`) can be had from
here too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from leanlift.errors import UserError
from leanlift.io.files import (
    digest_of,
    is_running,
    new_directory,
    read_json,
    remove_partials,
    replacing,
    sync_directory,
    sync_tree,
    write_json,
)

__all__ = [
    "SAFETENSORS_DTYPES",
    "ShardedWriter",
    "TensorFile",
    "TensorSpec",
    "digest_of",
    "is_running",
    "new_directory",
    "open_tensor_file",
    "open_tensors",
    "plan_shards",
    "read_json",
    "remove_partials",
    "replacing",
    "sync_directory",
    "sync_tree",
    "write_json",
    "write_tensors",
]

SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file; the same tensors give the same bytes."""
    with replacing(path) as temporary:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            temporary,
            metadata={"format": "pt"},  # one key: the library does not sort them
        )


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """`safetensors.safe_open` on the CPU, with one clear sentence where that fails.

    Raises:
        UserError: missing, truncated or not a safetensors file.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: is the directory the right one?")
    try:
        handle = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}): it may be truncated or only half "
            "downloaded; fetch it again."
        ) from None
    with handle as opened:
        yield opened


@dataclass(frozen=True)
class TensorFile:
    """An open safetensors file that anyone may have written; every failure is a sentence."""

    path: Path
    names: frozenset[str]
    _handle: Any

    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU.

        Raises:
            UserError: it is not there, or cannot be read.
        """
        if name not in self.names:
            raise UserError(f"{self.path} lacks {name}: it is not whole.")
        try:
            return self._handle.get_tensor(name)
        except Exception as error:  # the library has no one kind for what a file can be
            self._tell_from_an_interrupt(name)
            raise UserError(f"{name} in {self.path} cannot be read ({error!r}).") from None

    def _tell_from_an_interrupt(self, name: str) -> None:
        """torch turns a Ctrl-C inside a read into an error of its own: what cannot be read now and
        can be read right after was no fault of the file."""
        try:
            self._handle.get_tensor(name)
        except Exception:
            return
        raise KeyboardInterrupt


@contextmanager
def open_tensor_file(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file for reading tensor by tensor.

    Raises:
        UserError: missing, truncated or not a safetensors file.
    """
    with open_tensors(path) as handle:
        yield TensorFile(path, frozenset(handle.keys()), handle)


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor will look like on disk."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        numel = 1
        for size in self.shape:
            numel *= size
        return numel * self.dtype.itemsize


def plan_shards(specs: Iterable[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    """Group tensors, in order, into shards of at most `max_shard_bytes` (or one tensor)."""
    shards: list[list[TensorSpec]] = []
    size = 0
    for spec in specs:
        if not shards or size + spec.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


class ShardedWriter:
    """Writes tensors of known shape, piece by piece, as `save_pretrained` would name the files.

    Use as a context manager; write every tensor of the plan, in its order.

    Args:
        directory: where; it exists.
        specs: the tensors.
        max_shard_bytes: of one file; a larger tensor gets a file of its own.
        stem: what the files are called before the number of a shard.
    """

    def __init__(
        self,
        directory: Path,
        specs: list[TensorSpec],
        max_shard_bytes: int,
        stem: str = "model",
    ) -> None:
        self.directory = directory
        self.stem = stem
        self.shards = plan_shards(specs, max_shard_bytes)
        total = len(self.shards)
        self.names = (
            [f"{stem}.safetensors"]
            if total == 1
            else [f"{stem}-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
        )
        self._pending = [
            (spec, name)
            for shard, name in zip(self.shards, self.names, strict=True)
            for spec in shard
        ]
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> ShardedWriter:
        return self

    def write(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Write tensor `name`, the next one of the plan, from consecutive row pieces."""
        spec, file_name = self._pending.pop(0)
        assert spec.name == name, f"expected {spec.name} next, got {name}"
        file = self._file(file_name)
        written = 0
        for piece in pieces:
            assert piece.dtype == spec.dtype, f"{name}: expected {spec.dtype}, got {piece.dtype}"
            data = piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            file.write(data.data)
            written += data.nbytes
        assert written == spec.nbytes, f"{name}: expected {spec.nbytes} bytes, got {written}"

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            file.close()
        if kind is not None:
            return
        assert not self._pending, f"{len(self._pending)} tensors of the plan were not written"
        if len(self.shards) > 1:
            weight_map = {
                spec.name: name
                for shard, name in zip(self.shards, self.names, strict=True)
                for spec in shard
            }
            total = sum(spec.nbytes for shard in self.shards for spec in shard)
            write_json(
                self.directory / f"{self.stem}.safetensors.index.json",
                {"metadata": {"total_size": total}, "weight_map": weight_map},
            )

    def _file(self, name: str) -> BinaryIO:
        if name not in self._files:
            for file in self._files.values():
                file.close()
            self._files[name] = open(self.directory / name, "wb")  # noqa: SIM115
            self._files[name].write(_header(self.shards[self.names.index(name)]))
        return self._files[name]


def _header(specs: list[TensorSpec]) -> bytes:
    """The safetensors header: length, then JSON padded to 8 bytes with spaces."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        entries[spec.name] = {
            "dtype": SAFETENSORS_DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
