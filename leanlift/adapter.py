"""The adapter on disk: `adapter_model.safetensors` and `adapter_config.json`.

Per trained module: `<path>.values` (float [k]), `<path>.index.columns` and `<path>.index.counts`
(the compact index), and the same three under `<path>.settled` where a refresh has let entries
go. The config file holds the format version, the LiftConfig and the fingerprint of the base.
Nothing is unpickled. Modules are read one at a time, so a merge never holds a whole adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanlift._version import __version__
from leanlift.checkpoint import open_tensors, read_json, write_json, write_tensors
from leanlift.config import LiftConfig
from leanlift.errors import UserError
from leanlift.fingerprint import BaseFingerprint
from leanlift.layer import LiftLinear
from leanlift.sparse import SegmentedIndex, add_offsets_

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Store:
    """Offsets at positions: one layer's active or settled entries."""

    index: SegmentedIndex
    values: Tensor


@dataclass(frozen=True)
class LayerOffsets:
    """What one layer has learned."""

    active: Store
    settled: Store | None

    def add_to_(self, rows: Tensor, start: int, stop: int) -> None:
        """Add all offsets of rows `start:stop` to `rows`, in place."""
        for store in (self.active, self.settled):
            if store is not None:
                add_offsets_(rows, store.index, store.values, start, stop)


def write_adapter(
    directory: Path,
    layers: dict[str, LiftLinear],
    config: LiftConfig,
    base: BaseFingerprint,
    refreshes: int,
) -> None:
    """Write both files, each whole or not at all."""
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{name}.values"] = layer.values
        tensors[f"{name}.index.columns"] = layer.index.columns
        tensors[f"{name}.index.counts"] = layer.index.counts
        if layer.settled_index is not None and layer.settled_values is not None:
            tensors[f"{name}.settled.values"] = layer.settled_values
            tensors[f"{name}.settled.index.columns"] = layer.settled_index.columns
            tensors[f"{name}.settled.index.counts"] = layer.settled_index.counts
    write_tensors(directory / WEIGHTS_NAME, tensors)
    write_json(
        directory / CONFIG_NAME,
        {
            "peft_type": "LEANLIFT",
            "format_version": FORMAT_VERSION,
            "leanlift_version": __version__,
            "base_model_name_or_path": base.name,
            "refreshes": refreshes,
            "lift": config.to_dict(),
            "base": base.to_dict(),
        },
    )


@dataclass(frozen=True)
class Adapter:
    """An adapter directory opened for reading; `layer(name)` reads one module."""

    directory: Path
    config: LiftConfig
    base: BaseFingerprint
    refreshes: int
    _tensors: Any

    def layer(self, name: str) -> LayerOffsets:
        """The offsets of one module, on the CPU.

        Raises:
            UserError: tensors missing, of wrong type, or positions that are no sorted set.
        """
        active = self._store(name, self.base.shapes[name])
        assert active is not None
        return LayerOffsets(active, self._store(f"{name}.settled", self.base.shapes[name]))

    def _store(self, name: str, shape: tuple[int, int]) -> Store | None:
        keys = [f"{name}.values", f"{name}.index.columns", f"{name}.index.counts"]
        present = set(self._tensors.keys())
        if name.endswith(".settled") and not present.intersection(keys):
            return None
        missing = [key for key in keys if key not in present]
        if missing:
            raise UserError(f"{self.directory / WEIGHTS_NAME} lacks {missing[0]}: it is not whole.")
        values, columns, counts = (self._tensors.get_tensor(key) for key in keys)
        if values.dtype not in (torch.float32, torch.bfloat16, torch.float16) or values.dim() != 1:
            raise UserError(
                f"{name}.values in {self.directory} is {values.dtype} {tuple(values.shape)}; "
                "expected a 1-D floating tensor."
            )
        if not bool(torch.isfinite(values).all()):
            raise UserError(f"{name}.values in {self.directory} holds NaN or infinite offsets.")
        try:
            index = SegmentedIndex.from_parts(shape, columns, counts)
        except ValueError as error:
            raise UserError(
                f"the index of {name} in {self.directory} is broken: {error}."
            ) from None
        if values.numel() != index.count:
            raise UserError(
                f"{name} in {self.directory} has {values.numel()} values for {index.count} "
                "positions."
            )
        return Store(index, values)


@contextmanager
def open_adapter(directory: str | Path) -> Iterator[Adapter]:
    """Open an adapter directory.

    Raises:
        UserError: not an adapter of leanlift, of a newer format, or not whole.
    """
    directory = Path(directory)
    if not (directory / CONFIG_NAME).is_file():
        raise UserError(
            f"{directory} is no leanlift adapter: it has no {CONFIG_NAME}. Expected a directory "
            "written by save_adapter or a training run."
        )
    data = read_json(directory / CONFIG_NAME)
    if not isinstance(data, dict) or "lift" not in data or "base" not in data:
        raise UserError(
            f"{directory / CONFIG_NAME} was not written by leanlift (peft_type "
            f"{data.get('peft_type') if isinstance(data, dict) else None!r})."
        )
    if data.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{directory} has adapter format {data.get('format_version')}; this leanlift reads "
            f"format {FORMAT_VERSION}: upgrade leanlift."
        )
    try:
        config = LiftConfig.from_dict(data["lift"])
        base = BaseFingerprint.from_dict(data["base"])
        refreshes = int(data.get("refreshes", 0))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{directory / CONFIG_NAME} is damaged: {error!r}.") from None
    with open_tensors(directory / WEIGHTS_NAME) as tensors:
        yield Adapter(directory, config, base, refreshes, tensors)
