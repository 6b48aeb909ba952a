"""A base checkpoint on disk, read by rows, without transformers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from leanlift.errors import UserError
from leanlift.fingerprint import sampled_rows
from leanlift.io.tensors import SAFETENSORS_DTYPES, open_tensors, read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TORCH_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of the checkpoint; as RowTiles where it is 2-D.

    What is read is mapped from the file, not copied: it costs page cache, not memory.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    _slice: Any

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def rows(self, start: int, stop: int) -> Tensor:
        return self._slice[start:stop]

    @property
    def stored_names(self) -> tuple[str, ...]:
        """The tensors of the file that it is made of: itself."""
        return (self.name,)

    def matrix_rows(self, start: int, stop: int) -> Tensor:
        """Of a 3-D tensor [E, m, n], rows `start:stop` of those of all its matrices, [E * m, n]."""
        m = self.shape[1]
        first, last = start // m, -(-stop // m)
        return self.rows(first, last).flatten(0, 1)[start - first * m : stop - first * m]

    def whole(self) -> Tensor:
        """The whole tensor, mapped from its file."""
        return self._slice[...]

    def entries(self, flat: Tensor) -> Tensor:
        """Entries at row-major positions [s]; of the file, the pages that hold them."""
        return self.whole().flatten()[flat]

    def sample(self, rows: int) -> Tensor:
        """At most `rows` evenly spaced rows; all of a 1-D tensor."""
        if len(self.shape) == 1:
            return self.whole()
        return self.whole()[sampled_rows(self.shape[0], rows)]


@contextmanager
def open_checkpoint(directory: Path) -> Iterator[dict[str, SourceTensor]]:
    """All tensors of a safetensors checkpoint, by name, in file order.

    Raises:
        UserError: no checkpoint, only pickle files, or a shard missing or cut off.
    """
    if (directory / INDEX).is_file():
        weight_map = _weight_map(directory / INDEX)
        files = list(dict.fromkeys(weight_map.values()))
    elif (directory / WEIGHTS).is_file():
        weight_map, files = None, [WEIGHTS]
    elif list(directory.glob("*.bin")) or list(directory.glob("*.pth")):
        raise UserError(
            f"{directory} holds only pickled weights (.bin), which leanlift does not open: save it "
            "again with save_pretrained, which writes safetensors."
        )
    else:
        raise UserError(
            f"{directory} holds no checkpoint: expected {WEIGHTS} or {INDEX} with its shards."
        )
    with open_files(directory / file for file in files) as tensors:
        missing = sorted(set(weight_map or ()) - set(tensors))
        if missing:
            raise UserError(
                f"{directory / INDEX} names {missing[0]}, which no shard holds: the checkpoint is "
                "only half there; fetch it again."
            )
        yield tensors


@contextmanager
def open_files(files: Iterable[Path]) -> Iterator[dict[str, SourceTensor]]:
    """All tensors of some safetensors files, by name, in the files' order.

    Raises:
        UserError: a file that is missing or cut off.
    """
    tensors: dict[str, SourceTensor] = {}
    with ExitStack() as stack:
        for file in files:
            handle = stack.enter_context(open_tensors(file))
            for name in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                tensors[name] = _source(handle, name, file)
        yield tensors


def _weight_map(path: Path) -> dict[str, str]:
    """Which tensor is in which file beside the index.

    Raises:
        UserError: the index says something else.
    """
    data = read_json(path)
    found = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(found, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in found.values()
    ):
        raise UserError(
            f"{path} holds no map from tensors to files beside it: the checkpoint is damaged; "
            "fetch it again."
        )
    return found


def _source(handle: Any, name: str, path: Path) -> SourceTensor:
    try:
        part = handle.get_slice(name)
        dtype = TORCH_DTYPES[part.get_dtype()]
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{name} in {path} cannot be read: {error!r}.") from None
    return SourceTensor(name, tuple(part.get_shape()), dtype, part)
