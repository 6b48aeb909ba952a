"""A matrix of the model that a checkpoint holds as rows of other tensors, fused or in parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from leanlift.fingerprint import Home, overlaps
from leanlift.source.checkpoint import SourceTensor


@dataclass(frozen=True)
class JoinedRows:
    """Rows of one or several tensors on disk, seen as the one matrix that they are in the model.

    Attributes:
        name: of the model's tensor.
        home: where its rows are.
        parts: the tensors on disk, by name.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    home: Home
    parts: Mapping[str, SourceTensor]

    @classmethod
    def of(cls, name: str, home: Home, tensors: Mapping[str, object]) -> JoinedRows | None:
        """None where the checkpoint lacks a part of it, or has one in another shape."""
        parts = {part.name: tensors.get(part.name) for part in home}
        found = {key: part for key, part in parts.items() if isinstance(part, SourceTensor)}
        kinds = {(part.shape[1:], part.dtype) for part in found.values()}
        if len(found) < len(parts) or len(kinds) != 1:
            return None
        if any(part.first + part.rows > found[part.name].shape[0] for part in home):
            return None
        ((rest, dtype),) = kinds
        return cls(name, (sum(part.rows for part in home), *rest), dtype, home, found)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def rows(self, start: int, stop: int) -> Tensor:
        pieces = [
            self.parts[part.name].rows(part.first, part.first + part.rows)
            for part, _ in overlaps(self.home, start, stop)
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def whole(self) -> Tensor:
        """All rows."""
        return self.rows(0, self.shape[0])

    def entries(self, flat: Tensor) -> Tensor:
        """Entries at row-major positions [s] of the model's matrix, in increasing order."""
        return self.whole().flatten()[flat]
