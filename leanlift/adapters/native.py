"""leanlift's own form: `adapter_model.safetensors` and `adapter_config.json`.

Per trained module: `<path>.values` (float [k]), `<path>.index.columns` and `<path>.index.counts`
(the compact index), and the same three under `<path>.settled` where a refresh has let entries
go. The config file holds the format version, the LiftConfig and the fingerprint of the base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanlift._version import __version__
from leanlift.adapters.embedding import TrainedEmbedding, all_shapes
from leanlift.adapters.offsets import Adapter
from leanlift.adapters.special import SpecialTokens
from leanlift.adapters.task import Task
from leanlift.config import LiftConfig
from leanlift.errors import UserError
from leanlift.fingerprint import BaseFingerprint
from leanlift.io.places import (
    ADAPTER_FORMATS,
    CONFIG_NAME,
    RETIRED,
    WEIGHTS_NAME,
    WRITTEN_TYPE,
)
from leanlift.io.tensors import TensorFile, write_json, write_tensors
from leanlift.sparse import LayerOffsets, Offsets, SegmentedIndex, index_nbytes
from leanlift.weights.grown import Grown
from leanlift.weights.quantized import dtype_of

FORMAT_VERSION = 2
GROWN_VERSION, LAYOUT_VERSION, TASK_VERSION = 3, 4, 5
PARTS = ("values", "index.columns", "index.counts")


@dataclass(frozen=True)
class AdapterMetadata:
    """What an adapter says about itself beside its tensors."""

    config: LiftConfig
    base: BaseFingerprint
    refreshes: int
    special: SpecialTokens = field(default_factory=SpecialTokens)
    grown: Grown | None = None
    task: Task | None = None
    embedding: TrainedEmbedding | None = None

    @property
    def version(self) -> int:
        """The oldest format that says all of it."""
        if self.task is not None or self.embedding is not None:
            return TASK_VERSION
        if self.base.layout:
            return LAYOUT_VERSION
        return FORMAT_VERSION if self.grown is None else GROWN_VERSION

    def to_dict(self) -> dict[str, Any]:
        """What adapter_config.json holds."""
        return {
            "format_version": self.version,
            "leanlift_version": __version__,
            "base_model_name_or_path": self.base.name,
            "refreshes": self.refreshes,
            "lift": self.config.to_dict(),
            "base": self.base.to_dict(),
            "special_tokens": self.special.to_dict(),
            **({} if self.grown is None else self.grown.to_dict()),
            **({} if self.task is None else {"task": self.task.to_dict()}),
            **({} if self.embedding is None else {"embedding": self.embedding.to_dict()}),
        }

    def adapter(self, directory: Path, form: str, read: Callable[[str], LayerOffsets]) -> Adapter:
        """An adapter of which these are the metadata; see `Adapter` for the arguments."""
        return Adapter(
            directory,
            form,
            self.config,
            self.base,
            self.refreshes,
            self.special,
            read,
            self.grown,
            self.task,
            self.embedding,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any], path: Path) -> AdapterMetadata:
        """Back from `to_dict`, read from the file `path`, which anyone may have written.

        Raises:
            UserError: another format version, or values that no adapter has.
        """
        version = data.get("format_version")
        if type(version) is not int or version not in ADAPTER_FORMATS:
            raise UserError(
                f"{path} has adapter format {version!r:.80}; this leanlift reads formats "
                f"{ADAPTER_FORMATS[0]} to {ADAPTER_FORMATS[-1]}: upgrade leanlift."
            )
        refreshes = data.get("refreshes", 0)
        if type(refreshes) is not int or refreshes < 0:
            raise UserError(
                f"{path} is damaged: expected a count of refreshes, got {refreshes!r:.80}."
            )
        try:
            config = LiftConfig.from_dict(data["lift"])
            base = BaseFingerprint.from_dict(data["base"])
            special = SpecialTokens()
            if "special_tokens" in data:
                special = SpecialTokens.from_dict(data["special_tokens"])
            _check_parts(data, {"task": base.new, "embedding": config.trainable_token_indices})
            task = Task.from_dict(data["task"]) if base.new else None
            if task is not None:
                task.check_rows({name: base.shapes[name][0] for name in base.new})
            rows = None
            if config.trainable_token_indices:
                rows = TrainedEmbedding.from_dict(data["embedding"])
            return cls(config, base, refreshes, special, Grown.from_dict(data), task, rows)
        except KeyError as error:
            raise UserError(f"{path} is damaged: it lacks {error}.") from None
        except UserError as error:
            raise UserError(f"{path} is damaged: {error}") from None


def _check_parts(data: Mapping[str, Any], wanted: Mapping[str, object]) -> None:
    """Refuse what is there without what it is about.

    Args:
        data: of an adapter.
        wanted: a key, and what it is about; nothing: the key may not be there.

    Raises:
        UserError: it is.
    """
    for key, about in wanted.items():
        if key in data and not about:
            raise UserError(f"it has {key!r}, and nothing that this is about.")


def write_adapter(
    directory: Path, layers: Mapping[str, LayerOffsets], facts: AdapterMetadata
) -> None:
    """Write both files, each whole or not at all; the same content gives the same bytes.

    Raises:
        UserError: not into such a place.
    """
    check_adapter_place(directory)
    tensors: dict[str, Tensor] = {}
    for name, offsets in layers.items():
        tensors |= _tensors(name, offsets.active)
        if offsets.retired is not None:
            tensors |= _tensors(name + RETIRED, offsets.retired)
    write_tensors(directory / WEIGHTS_NAME, tensors)
    write_json(directory / CONFIG_NAME, {"peft_type": WRITTEN_TYPE, **facts.to_dict()})


def check_adapter_place(directory: str | Path) -> None:
    """Refuse to write an adapter where it cannot lie, or would do harm: stock transformers takes a
    model that has an adapter_config.json beside it for an adapter of PEFT's.

    Raises:
        UserError: it is a file, or holds a model.
    """
    place = Path(directory)
    if place.exists() and not place.is_dir():
        raise UserError(f"{place} is no directory to write an adapter into: choose another one.")
    if (place / "config.json").is_file():
        raise UserError(
            f"{place} holds a model, which nothing would load with an adapter beside it: choose "
            "another directory."
        )


def _tensors(prefix: str, store: Offsets) -> dict[str, Tensor]:
    parts = (store.values, store.index.columns, store.index.counts)
    return {f"{prefix}.{part}": tensor for part, tensor in zip(PARTS, parts, strict=True)}


def read_native(directory: Path, data: dict[str, Any], tensors: TensorFile) -> Adapter:
    """An adapter in leanlift's own form.

    Raises:
        UserError: a damaged config, or tensors that it does not name.
    """
    metadata = AdapterMetadata.from_dict(data, directory / CONFIG_NAME)
    shapes = all_shapes(metadata.base, metadata.embedding)
    prefixes = {p for name in shapes for p in (name, name + RETIRED)}
    for key in tensors.names:
        if not any(key.endswith(f".{p}") and key[: -len(p) - 1] in prefixes for p in PARTS):
            raise UserError(
                f"{tensors.path} holds {key!r:.120}, which {CONFIG_NAME} does not speak of: the "
                "two files do not belong together."
            )

    dtype = dtype_of(metadata.config.values_dtype)

    def read(name: str) -> LayerOffsets:
        shape = shapes[name]
        active = _read_store(tensors, name, shape, dtype)
        if not any(f"{name}{RETIRED}.{part}" in tensors.names for part in PARTS):
            return LayerOffsets(active, None)
        offsets = LayerOffsets(active, _read_store(tensors, name + RETIRED, shape, dtype))
        offsets.check_disjoint(f"{name} in {tensors.path}")
        return offsets

    return metadata.adapter(directory, "leanlift", read)


LARGEST_INDEX = 128
"""Bytes of a module's index per trained entry. 16384 x 53248 has 50 at r = 1; a claim of 2^31 rows
that nothing stands behind has far more, and must not be allocated."""

SMALL_INDEX = 4 * 2**20
"""Bytes of an index that any module may have."""


def check_backed(shape: tuple[int, int], entries: int, what: str) -> None:
    """Refuse a matrix whose index would be out of all proportion to the entries it is for.

    Raises:
        UserError: it would.
    """
    if index_nbytes(shape, 0) > max(SMALL_INDEX, LARGEST_INDEX * entries):
        raise UserError(
            f"{what} has {entries} entries, too few for the {shape[0]}x{shape[1]} matrix that it "
            "is said to be."
        )


def _read_store(
    tensors: TensorFile, name: str, shape: tuple[int, int], dtype: torch.dtype
) -> Offsets:
    values, columns, counts = (tensors.get(f"{name}.{part}") for part in PARTS)
    if not name.endswith(RETIRED):  # retired entries are as few as they are
        check_backed(shape, values.numel(), f"{name} in {tensors.path}")
    check_values(values, dtype, f"{name}.values in {tensors.path}")
    try:
        index = SegmentedIndex.from_parts(shape, columns, counts)
    except ValueError as error:
        raise UserError(f"the index of {name} in {tensors.path} is broken: {error}.") from None
    if values.numel() != index.count:
        raise UserError(
            f"{name} in {tensors.path} has {values.numel()} values for {index.count} positions."
        )
    return Offsets(index, values)


def check_values(values: Tensor, dtype: torch.dtype, what: str) -> None:
    """Refuse offsets that are not finite numbers in a row.

    Args:
        values: the offsets.
        dtype: in which they are trained; the largest fp32 numbers are infinite in bf16.
        what: what they are called in a message.

    Raises:
        UserError: another dtype or shape, NaN or infinite.
    """
    if values.dtype not in (torch.float32, torch.bfloat16, torch.float16) or values.dim() != 1:
        raise UserError(
            f"{what} is {values.dtype} {tuple(values.shape)}; expected a 1-D floating tensor."
        )
    ends = torch.stack(torch.aminmax(values)) if values.numel() else values  # takes no memory
    if not bool(torch.isfinite(ends.to(dtype)).all()):
        raise UserError(f"{what} holds NaN or infinite offsets.")
