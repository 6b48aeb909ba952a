"""The embedding and the head of a merge, with the rows that the base has not.

The new rows are made again from the base's (`leanlift.weights.grown`), as it was loaded for
training; the others are read from the file as always.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from leanlift.adapters import Adapter
from leanlift.errors import UserError
from leanlift.export.identity import embedding_of, places
from leanlift.source import SourceTensor, Stored, find
from leanlift.tiles import CastTiles, DenseTiles, RowTiles
from leanlift.weights.grown import new_rows
from leanlift.weights.quantized import dtype_of


def with_new_rows(adapter: Adapter, tensors: dict[str, Stored]) -> dict[str, Stored]:
    """The tensors of a base with as many rows in embedding and head as the adapter's model had.

    Raises:
        UserError: a number of rows or a head that the base cannot have.
    """
    grown, embedding = adapter.grown, embedding_of(adapter, tensors)
    if grown is None:
        return tensors
    if embedding is None or grown.head in adapter.base.shapes:
        raise UserError(f"{adapter.directory} does not say which embedding has grown.")
    have, loaded = embedding.shape[0], dtype_of(adapter.base.dtype)
    grown.check(have, str(adapter.directory))
    layout = adapter.base.layout
    head, bias = (find(f"{grown.head}.{part}", tensors, layout) for part in ("weight", "bias"))
    changed = {embedding.name: embedding.shape}
    if head is not None:  # a tied one may be stored as well
        changed[head.name] = embedding.shape
    if bias is not None:
        changed[bias.name] = (have,)
    trained = {
        name
        for name, parts in places(adapter, tensors).parts.items()
        if any(part.module in adapter.base.shapes for part in parts)
    }
    for name, other in tensors.items():
        if other.shape == embedding.shape and name not in changed and name not in trained:
            raise UserError(
                f"{name} of the base has a row for each token, but {adapter.directory} says that "
                f"the output head is {grown.head}: the adapter is damaged."
            )
    result = dict(tensors)
    for name, shape in changed.items():
        tensor = tensors[name]
        if not isinstance(tensor, SourceTensor) or tensor.shape != shape:
            raise UserError(
                f"{adapter.directory} was trained with more tokens than its base has, and {name} "
                f"of the base, {tensor.shape}, cannot get rows for them: expected {shape} that is "
                "not quantized."
            )
        result[name] = _grow(tensor, grown.rows, loaded)
    return result


def with_new_matrices(adapter: Adapter, tensors: dict[str, Stored]) -> dict[str, Stored]:
    """The tensors of a base, and zeros for the trained matrices that it has not.

    Raises:
        UserError: it has one of them.
    """
    new: dict[str, Stored] = {}
    for module in adapter.base.new:
        name, shape = f"{module}.weight", adapter.base.shapes[module]
        there = find(name, tensors, adapter.base.layout)
        if there is not None:
            raise UserError(
                f"{adapter.directory} was trained with a new {module} on {adapter.base.name}, but "
                f"the base has {there.name}: name the adapter's own base with --base."
            )
        dtype = dtype_of(adapter.base.dtype)
        new[name] = SourceTensor(name, shape, dtype, _Zeros(shape, dtype))
    return {**tensors, **new}


@dataclass(frozen=True)
class _Zeros:
    """Zeros, as a slice of safetensors is asked for them."""

    shape: tuple[int, int]
    dtype: torch.dtype

    def __getitem__(self, at: Any) -> Tensor:
        rows = range(self.shape[0])[at] if at is not Ellipsis else range(self.shape[0])
        return torch.zeros(len(rows), self.shape[1], dtype=self.dtype)


def put_vocabulary(rows: int, config: dict[str, Any]) -> None:
    """Let config.json (as data, edited here) say how many rows the embedding has."""
    nested = config.get("text_config")
    texts = [nested] if isinstance(nested, dict) else [config]
    for holder in (config, *texts):
        if holder in texts or "vocab_size" in holder:
            holder["vocab_size"] = rows


@dataclass(frozen=True)
class _Extended:
    """A tensor of a file and more rows, as a slice of safetensors is asked for them."""

    source: SourceTensor
    more: Tensor

    def __getitem__(self, at: Any) -> Tensor:
        have, dtype = self.source.shape[0], self.more.dtype
        if at is Ellipsis:
            return torch.cat([self.source.whole().to(dtype), self.more])
        start, stop, _ = at.indices(have + len(self.more))
        parts = []
        if start < have:
            parts.append(self.source.rows(start, min(stop, have)).to(dtype))
        if stop > have:
            parts.append(self.more[max(start - have, 0) : stop - have])
        return torch.cat(parts)


def _grow(tensor: SourceTensor, rows: int, loaded: torch.dtype) -> SourceTensor:
    """A tensor [m, n] or [m] with more rows, in a dtype that holds the old and the new ones."""
    matrix: RowTiles = tensor if len(tensor.shape) == 2 else DenseTiles(tensor.whole()[:, None])  # type: ignore[assignment]
    more = new_rows(CastTiles(matrix, loaded), rows, loaded).reshape(-1, *tensor.shape[1:])
    dtype = torch.promote_types(tensor.dtype, loaded)
    shape = (rows, *tensor.shape[1:])
    return replace(tensor, shape=shape, dtype=dtype, _slice=_Extended(tensor, more.to(dtype)))
