"""A matrix of the model that a checkpoint holds as rows of other tensors, fused or in parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from leanlift.fingerprint import Home, overlaps, sampled_rows
from leanlift.source.checkpoint import SourceTensor


@dataclass(frozen=True)
class _View:
    """A tensor of a checkpoint, seen as a matrix in another shape than it has there."""

    tensor: SourceTensor

    @property
    def name(self) -> str:
        """Of the tensor."""
        return self.tensor.name

    @property
    def stored_names(self) -> tuple[str, ...]:
        """Of the tensors of the file that it is made of."""
        return self.tensor.stored_names

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        return self.tensor.device


@dataclass(frozen=True)
class StackedRows(_View):
    """A tensor [E, m, n] of a checkpoint, seen as the rows [E * m, n] of its matrices."""

    @property
    def shape(self) -> tuple[int, int]:
        parts, m, n = self.tensor.shape
        return parts * m, n

    def rows(self, start: int, stop: int) -> Tensor:
        return self.tensor.matrix_rows(start, stop)

    def entries(self, flat: Tensor) -> Tensor:
        """Entries at row-major positions [s]; of the file, the pages that hold them."""
        return self.tensor.entries(flat)


@dataclass(frozen=True)
class TurnedRows(_View):
    """The transpose of a matrix of a checkpoint."""

    @property
    def shape(self) -> tuple[int, int]:
        n, m = self.tensor.shape
        return m, n

    def rows(self, start: int, stop: int) -> Tensor:
        return self.tensor.whole()[:, start:stop].T.contiguous()

    def entries(self, flat: Tensor) -> Tensor:
        """Entries at row-major positions [s] of the transpose."""
        m, n = self.shape
        return self.tensor.entries(flat % n * m + flat // n)


@dataclass(frozen=True)
class TurnedStackedRows(TurnedRows):
    """A tensor [E, n, m] of a checkpoint, seen as the rows [E * m, n] of the transposes of its
    matrices."""

    @property
    def shape(self) -> tuple[int, int]:
        parts, n, m = self.tensor.shape
        return parts * m, n

    def rows(self, start: int, stop: int) -> Tensor:
        m = self.tensor.shape[2]
        pieces = [
            self.tensor.rows(part, part + 1)[0, :, max(start - part * m, 0) : stop - part * m].T
            for part in range(start // m, -(-stop // m))
        ]
        return torch.cat(pieces).contiguous()

    def entries(self, flat: Tensor) -> Tensor:
        """Entries at row-major positions [s] of those rows."""
        _, n, m = self.tensor.shape
        part, row, column = flat // (m * n), flat // n % m, flat % n
        return self.tensor.entries((part * n + column) * m + row)


Rows = SourceTensor | StackedRows | TurnedRows


def turned_rows(tensor: SourceTensor) -> TurnedRows:
    """The rows of the transpose of a matrix of a checkpoint, or of those of a stack of them."""
    return (TurnedStackedRows if len(tensor.shape) == 3 else TurnedRows)(tensor)


def by_rows(tensor: SourceTensor) -> SourceTensor | StackedRows:
    """A tensor of a checkpoint as a matrix, where it is one or a stack of them."""
    return StackedRows(tensor) if len(tensor.shape) == 3 else tensor


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
    parts: Mapping[str, Rows]

    @classmethod
    def of(cls, name: str, home: Home, tensors: Mapping[str, object]) -> JoinedRows | None:
        """None where the checkpoint lacks a part of it, or has one in another shape."""
        parts = {part.name: (tensors.get(part.name), part.turned) for part in home}
        found = {
            key: turned_rows(part) if turned else by_rows(part)
            for key, (part, turned) in parts.items()
            if isinstance(part, SourceTensor) and (not turned or len(part.shape) in (2, 3))
        }
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

    def sample(self, rows: int) -> Tensor:
        """At most that many rows, evenly spaced."""
        chosen = sampled_rows(self.shape[0], rows)
        return torch.cat([self.rows(row, row + 1) for row in chosen])

    def entries(self, flat: Tensor) -> Tensor:
        """Entries at row-major positions [s] of the model's matrix, in increasing order; of the
        files, the pages that hold them."""
        pieces, at, n = [], 0, self.shape[1]
        for part in self.home:
            first, last = torch.searchsorted(flat, torch.tensor([at, at + part.rows]) * n).tolist()
            if first < last:
                own = flat[first:last] + (part.first - at) * n
                pieces.append(self.parts[part.name].entries(own))
            at += part.rows
        return torch.cat([torch.empty(0, dtype=self.dtype), *pieces])
