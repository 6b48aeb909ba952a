"""A frozen Linear with trainable offsets at chosen positions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from leanlift.layers.autograd import KeepInput
from leanlift.layers.frozen import FrozenLinear
from leanlift.layers.workspace import Workspace
from leanlift.sparse import (
    LayerOffsets,
    MaskChange,
    Offsets,
    SegmentedIndex,
    change_mask,
    common,
)
from leanlift.tiles import RowTiles, row_ranges, tile_rows

SAMPLED_TILE_BYTES = 64 * 2**20
"""Of fp32 rows whose selected entries are formed at once on a CPU."""


class LiftLinear(FrozenLinear):
    """A frozen Linear with trainable offsets at chosen positions.

    Args:
        base, weight, workspace: as for `FrozenLinear`.
        index: the active positions.
        values_dtype: fp32, or bf16 for an optimizer that rounds stochastically.

    Attributes:
        values: Parameter [k], the active offsets in the order of `index`; zero at first. Its
            gradient has its dtype.
        retired_index, retired_values: offsets that a mask change took out of training; they stay
            part of the effective weight. None while there are none.
        scale: what all offsets are multiplied by: 1.0 unless someone turns an adapter up or down.
    """

    retired_values: Tensor | None

    def __init__(
        self,
        base: nn.Module,
        weight: RowTiles,
        index: SegmentedIndex,
        workspace: Workspace,
        values_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(base, weight, workspace)
        if index.shape != weight.shape:
            raise ValueError(f"expected an index of shape {weight.shape}, got {index.shape}")
        self.index = index
        self.values = nn.Parameter(
            torch.zeros(index.count, dtype=values_dtype, device=weight.device)
        )
        self.retired_index: SegmentedIndex | None = None
        self.register_buffer("retired_values", None)
        self.scale = 1.0

    @property
    def effective(self) -> EffectiveTiles:
        """W_eff = D(Q) + retired + active offsets, as RowTiles in fp32."""
        return EffectiveTiles(self)

    def _carrier(self, x: Tensor) -> Tensor | None:
        if self.observer is not None or not self.values.requires_grad:
            return super()._carrier(x)
        return KeepInput.apply(x, self.values, self, self.values_gradient)

    @property
    def is_fixed(self) -> bool:
        """Whether there is nothing to choose: every entry is trained."""
        return self.index.is_full

    @property
    def learned(self) -> LayerOffsets:
        """The active and the retired offsets, scaled."""
        retired = None
        if self.retired_index is not None and self.retired_values is not None:
            retired = Offsets(self.retired_index, self.retired_values, self.scale)
        return LayerOffsets(Offsets(self.index, self.values.detach(), self.scale), retired)

    def offsets(self, start: int, stop: int) -> Sequence[Offsets]:
        """The active and the retired offsets of rows `start:stop`."""
        stores = self.learned.stores
        if stop - start == self.out_features:
            return stores
        return [store.rows(start, stop) for store in stores]

    def add_offsets_(self, rows: Tensor, start: int, stop: int) -> None:
        """Add all offsets of rows `start:stop`, scaled, to `rows` [stop - start, n], in place."""
        self.learned.add_to_(rows, start, stop)

    @property
    def version(self) -> tuple[float, ...]:
        """Changes whenever the effective weight does."""
        return self.values._version, id(self.index), id(self.retired_values), self.scale

    def values_gradient(self, x: Tensor, grad_y: Tensor) -> Tensor:
        """d loss / d values [k] in their dtype, by row tiles, from x [T, n] and grad_y [T, m]."""
        gradient = torch.empty_like(self.values)
        self.gradient_of_rows(grad_y, x, 0, gradient)
        return gradient if self.scale == 1 else gradient.mul_(self.scale)

    def gradient_of_rows(self, left: Tensor, right: Tensor, first: int, out: Tensor) -> None:
        """Write the entries of left^T [r, T] @ right [T, n] that are trained in rows `first:first +
        r` of the weight to their places in `out` [k], by row tiles."""
        (_, r), n = left.shape, right.shape[1]
        ops = self.workspace.ops or self.workspace.choose(right.device)
        for start, stop in row_ranges(r, _gradient_rows(r, n, right)):
            index, place = self.index.part(first + start, first + stop), out
            if index.count < out.numel():
                place = out[slice(*self.index.span(first + start, first + stop))]
            rows = left if stop - start == r else left[:, start:stop]
            ops.sampled_product(rows, right, index, place, self.workspace.scratch.take)

    @torch.no_grad()
    def change_mask(self, flat: Tensor) -> MaskChange:
        """Make `flat` (sorted, distinct, as many as before) the active positions.

        The Parameter object stays the same; whoever holds state about its entries follows
        `MaskChange.source`.
        """
        if flat.numel() != self.index.count:
            raise ValueError(f"expected {self.index.count} positions, got {flat.numel()}")
        change = change_mask(self.learned, flat)
        self._put(change.learned)
        return change

    @torch.no_grad()
    def put(self, learned: LayerOffsets) -> None:
        """Take over offsets, as many active ones as before, in the place of the present ones.

        The Parameter object stays the same. Where they come from another device they are moved.

        Raises:
            ValueError: another count, or a retired position that is trained: an entry has one
                offset.
        """
        if learned.active.count != self.index.count:
            raise ValueError(f"expected {self.index.count} entries, got {learned.active.count}")
        device = self.values.device
        retired = None if learned.retired is None else learned.retired.to(device)
        moved = LayerOffsets(learned.active.to(device), retired)
        if moved.retired is not None and common(moved.active.index, moved.retired.index):
            raise ValueError("expected retired positions outside the mask, got one that is trained")
        self._put(moved)

    def _put(self, learned: LayerOffsets) -> None:
        """Take over disjoint offsets that are on the layer's device."""
        self.index, self.scale = learned.active.index, learned.active.scale
        self.values.copy_(learned.active.values)
        retired = learned.retired
        if retired is None or not retired.count:
            self.retired_index = self.retired_values = None
        else:
            self.retired_index = retired.index
            self.retired_values = retired.values.to(self.values.dtype)

    @property
    def retired_nbytes(self) -> int:
        """Bytes of the retired store: its index and offsets."""
        if self.retired_index is None or self.retired_values is None:
            return 0
        return self.retired_index.nbytes + self.retired_values.nbytes

    def get_extra_state(self) -> Tensor:
        """A digest of the positions, uint8 [32], for state dicts: values alone say nothing."""
        digest = hashlib.sha256()
        for index in (self.index, self.retired_index):
            for part in () if index is None else (index.columns, index.counts):
                digest.update(part.cpu().numpy().tobytes())
        return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8).clone()

    def set_extra_state(self, state: Any) -> None:
        """Positions are compared before a state dict is loaded, and not changed by it."""

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, entries={self.index.count}"

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> LiftLinear:
        super()._apply(fn, recurse)
        self.index = self.index.map(fn)
        if self.retired_index is not None:
            self.retired_index = self.retired_index.map(fn)
        return self


class EffectiveTiles:
    """The effective weight of a LiftLinear, read by rows in fp32 without touching the scratch."""

    dtype = torch.float32

    def __init__(self, layer: LiftLinear) -> None:
        self.layer = layer

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.weight_tiles.shape

    @property
    def device(self) -> torch.device:
        return self.layer.values.device

    def rows(self, start: int, stop: int) -> Tensor:
        rows = self.layer.weight_tiles.rows(start, stop).to(torch.float32, copy=True)
        self.layer.add_offsets_(rows, start, stop)
        return rows


def _gradient_rows(m: int, n: int, x: Tensor) -> int:
    """Rows of the values' gradient that are formed at once.

    On CUDA all: the scratch has room for any layer's weight, and one product is as fast as several
    whose results stay in the cache for the gather (`benchmarks/gpu_proof`). On a CPU, many: of most
    masks the entries alone are formed.
    """
    return m if x.device.type == "cuda" else tile_rows(n, 4, SAMPLED_TILE_BYTES)
