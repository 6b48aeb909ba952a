"""What one adapter has learned at one layer, as it is put on, taken off, moved and named.

A layer computes with one adapter. What others have learned there lies in its shelf, as slots; to
switch is to exchange a slot, and copies nothing.

In a state dict a layer has the tensors that it has in an adapter's file: `values`, the positions
they belong to (`index.columns`, `index.counts`), and the same under `settled` for retired entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from leanlift.sparse import LayerOffsets, Offsets, SegmentedIndex

KEYS = ("values", "index.columns", "index.counts")
RETIRED = "settled."
SCALE = "scale"
"""Beside them, where an adapter is turned up or down."""
SETTLED = "settled_count"
"""How many entries are retired: whoever reads only the tensors that a fresh model has must not
lose them."""


@dataclass(frozen=True)
class Slot:
    """What one adapter has learned at one layer.

    Attributes:
        index, values, retired_index, retired_values, scale: as of `LiftLinear`.
    """

    index: SegmentedIndex
    values: nn.Parameter
    retired_index: SegmentedIndex | None = None
    retired_values: Tensor | None = None
    scale: float = 1.0

    @classmethod
    def empty(cls, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Slot:
        """Of an adapter that has nothing here."""
        nothing = torch.empty(0, dtype=dtype, device=device)
        return cls(SegmentedIndex.empty(shape, device), nn.Parameter(nothing, requires_grad=False))

    @classmethod
    def zero(cls, index: SegmentedIndex, dtype: torch.dtype) -> Slot:
        """Of an adapter that begins at some positions."""
        return cls(index, nn.Parameter(torch.zeros_like(index.columns, dtype=dtype)))

    @classmethod
    def frozen(cls, offsets: Offsets) -> Slot:
        """Of offsets that are not trained."""
        values = nn.Parameter(offsets.values, requires_grad=False)
        return cls(offsets.index, values, scale=offsets.scale)

    @property
    def learned(self) -> LayerOffsets:
        """The active and the retired offsets, scaled."""
        retired = None
        if self.retired_index is not None and self.retired_values is not None:
            retired = Offsets(self.retired_index, self.retired_values, self.scale)
        return LayerOffsets(Offsets(self.index, self.values.detach(), self.scale), retired)

    @property
    def nbytes(self) -> int:
        """Of index, values and what is retired."""
        retired = 0
        if self.retired_index is not None and self.retired_values is not None:
            retired = self.retired_index.nbytes + self.retired_values.nbytes
        return self.index.nbytes + self.values.nbytes + retired

    @property
    def is_zero(self) -> bool:
        """Whether nothing has been learned here."""
        return self.retired_values is None and not bool(self.values.any())

    def map(self, fn: Callable[[Tensor], Tensor]) -> Slot:
        """The same with `fn` (a move to a device) applied; the Parameter object stays."""
        self.values.data = fn(self.values.data)
        retired = None if self.retired_index is None else self.retired_index.map(fn)
        values = None if self.retired_values is None else fn(self.retired_values)
        return Slot(self.index.map(fn), self.values, retired, values, self.scale)

    def copy(self) -> Slot:
        """A frozen copy, whose positions and retired entries are shared: none of them is changed in
        place."""
        values = nn.Parameter(self.values.detach().clone(), requires_grad=False)
        return Slot(self.index, values, self.retired_index, self.retired_values, self.scale)


def keep_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What moves a tensor as `fn` does and leaves its dtype: rounding is not taken back."""

    def moved(tensor: Tensor) -> Tensor:
        changed = fn(tensor)
        return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

    return moved


def state_of(learned: LayerOffsets, prefix: str) -> dict[str, Tensor]:
    """The tensors of a state dict beside the values."""
    index = learned.active.index
    state = {f"{prefix}index.columns": index.columns, f"{prefix}index.counts": index.counts}
    settled = 0 if learned.retired is None else learned.retired.count
    state[f"{prefix}{SETTLED}"] = torch.tensor(settled)
    if learned.active.scale != 1:
        state[f"{prefix}{SCALE}"] = torch.tensor(learned.active.scale, dtype=torch.float64)
    if learned.retired is not None:
        index = learned.retired.index
        tensors = learned.retired.values, index.columns, index.counts
        state |= {f"{prefix}{RETIRED}{key}": one for key, one in zip(KEYS, tensors, strict=True)}
    return state


def is_state_key(key: str, prefix: str) -> bool:
    """Whether a key of a state dict is one of these tensors of the layer at `prefix`."""
    return key[len(prefix) :].removeprefix(RETIRED) in (*KEYS, SCALE, SETTLED)


def learned_of(given: Mapping[str, Any], shape: tuple[int, int]) -> LayerOffsets:
    """What was learned, from tensors by key.

    Raises:
        ValueError: one is missing, or they are no positions of such a matrix.
    """

    def store(prefix: str) -> Offsets:
        lacking = [f"{prefix}{key}" for key in KEYS if f"{prefix}{key}" not in given]
        if lacking:
            raise ValueError(f"{', '.join(lacking)} is missing: values belong to positions")
        values, columns, counts = (given[f"{prefix}{key}"] for key in KEYS)
        index = SegmentedIndex.from_parts(shape, columns, counts)
        if values.shape != (index.count,):
            raise ValueError(f"expected {index.count} values, got {tuple(values.shape)}")
        return Offsets(index, values, scale)

    scale = float(given.get(SCALE, 1.0))
    has_retired = int(given.get(SETTLED, 0)) > 0 or any(key.startswith(RETIRED) for key in given)
    return LayerOffsets(store(""), store(RETIRED) if has_retired else None)
