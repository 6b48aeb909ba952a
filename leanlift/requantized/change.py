"""How many of the changed weights still have their change after they were quantized again.

Training moves a weight by a little, d, which 16 bits hold. Quantized to few bits, weights sit on a
coarse grid: where d is smaller than the grid's step, most changed weights round to the value that
the base's weight rounds to, and their change is gone; some jump by a whole step. A weight *keeps*
its change if what it holds differs from what the base's holds, both quantized alike, by at least
half of d, in d's direction:

    (Q(base + d) - Q(base)) · sign(d) ≥ |d| / 2

The share of changed weights that do is what `Change` counts. It is about weights one by one: a
layer adds many of them up, and errors that point in all directions cancel, so answers keep more
than this share says; how much is measured in the loss (`check`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leanlift.tiles import DEFAULT_TILE_BYTES


@dataclass
class Change:
    """What has been counted so far.

    Attributes:
        changed: weights that differ from the base's in 16 bits.
        kept: those that keep their change.
        total: all weights of the matrices that were looked at.
    """

    changed: int = 0
    kept: int = 0
    total: int = 0

    def add(self, base: Tensor, merged: Tensor, base_held: Tensor, held: Tensor) -> None:
        """Count the weights of some rows, all [r, n]: in 16 bits and as they are held."""
        moved = merged.float() - base.float()
        changed = moved != 0
        along = (held.float() - base_held.float()) * moved.sign()
        self.changed += int(changed.sum())
        self.kept += int((changed & (along >= moved.abs() / 2)).sum())
        self.total += moved.numel()

    @property
    def share(self) -> float:
        """Of the changed weights, those that keep their change; NaN where none were changed."""
        return self.kept / self.changed if self.changed else float("nan")


def change_in_files(base: Path, merged: Path, base_held: Path, held: Path) -> Change:
    """Compare four GGUF files of one model, tensor by tensor: base and merge in 16 bits, and both
    quantized alike. Files are mapped; a few megabytes of rows are in memory."""
    from gguf import GGUFReader

    readers = [GGUFReader(str(file)) for file in (base, merged, base_held, held)]
    named = [{tensor.name: tensor for tensor in reader.tensors} for reader in readers]
    found = Change()
    for name, first in named[0].items():
        tensors = [of.get(name) for of in named]
        if len(first.shape) < 2 or None in tensors:
            continue
        shapes = {tuple(tensor.shape) for tensor in tensors if tensor is not None}
        if len(shapes) == 1:
            _add_rows(found, tensors)
    return found


def types_in(file: Path) -> dict[str, int]:
    """How many matrices of a GGUF file are held in each of llama.cpp's types, most first."""
    from gguf import GGUFReader

    found: dict[str, int] = {}
    for tensor in GGUFReader(str(file)).tensors:
        if len(tensor.shape) > 1:
            found[tensor.tensor_type.name] = found.get(tensor.tensor_type.name, 0) + 1
    return dict(sorted(found.items(), key=lambda each: -each[1]))


def _add_rows(found: Change, tensors: list[Any]) -> None:
    """Count a matrix, or a stack of them, by tiles of rows."""
    from gguf import dequantize

    width = int(tensors[0].shape[0])  # GGUF has the fastest dimension first
    held = [
        (tensor.data.reshape(-1, tensor.data.shape[-1]), tensor.tensor_type) for tensor in tensors
    ]
    rows, step = len(held[0][0]), max(1, DEFAULT_TILE_BYTES // (4 * width))
    for start in range(0, rows, step):
        pieces = [
            torch.from_numpy(np.asarray(dequantize(data[start : start + step], kind), np.float32))
            for data, kind in held
        ]
        found.add(*pieces)
