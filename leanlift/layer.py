"""The patched layer: y = x (D(Q) + offsets)^T + bias, with gradients for the offsets alone.

What is kept for the backward pass is x and nothing dense. The work is split over two autograd
functions, so that activation checkpointing can stop recomputing as soon as it has x back and
never repeats a matmul whose output nobody needs:

    carrier = KeepInput(x, values, …)   keeps x; in backward forms the gradient of the values
    y       = Multiply(x, carrier)      keeps nothing; in backward forms the gradient of x

`carrier` is the thread between them: an expanded scalar of y's shape, without memory of its own.
Its "gradient" is grad_y, which is how KeepInput gets to see it.

Both directions need the effective weight. It is rebuilt each time, in a scratch buffer that all
layers of a model share; on a CPU, where a 4-bit weight is dequantized into a new tensor, in that.
The values' gradient is formed by row tiles of grad_y^T @ x, of which only the selected entries are
kept, and on a CPU only they are formed: no dense weight gradient of more than one tile ever exists.

Shapes: x [..., n], y [..., m], W [m, n], k entries, T = product of the leading dimensions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from leanlift.ops import Offsets, TileOps, add_offsets_, tile_ops
from leanlift.sparse import MaskChange, SegmentedIndex, change_mask, find_positions, offsets_of
from leanlift.tiles import RowTiles, row_ranges, tile_rows

TILE_BYTES = 16 * 2**20
"""Of fp32 rows that are read, patched or formed at once: the decoded positions of a tile, and the
like, are a few times its entries."""

SAMPLED_TILE_BYTES = 64 * 2**20
"""Of fp32 rows whose selected entries are formed at once on a CPU."""


class Scratch:
    """One growing buffer per dtype and device, lent to whoever computes right now.

    A view is valid until the next `take`. One per model: models do not disturb each other.

    Attributes:
        implementation: "auto", "torch" or "triton": which operations work in it; see `tile_ops`.
        always: whether it is used even where a matrix would be new anyway; for planning.
    """

    def __init__(self, implementation: str = "auto", always: bool = False) -> None:
        self.implementation = implementation
        self.always = always
        self._buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._ops: tuple[Any, Any] = (None, None)

    def take(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialized contiguous [rows, columns] view."""
        key, numel = (dtype, device), rows * columns
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < numel:
            self._buffers.pop(key, None)
            with torch.inference_mode(False):  # or training could never write to it again
                buffer = self._buffers[key] = torch.empty(numel, dtype=dtype, device=device)
        return buffer[:numel].view(rows, columns)

    def ops(self, device: torch.device) -> TileOps:
        """What the implementation means on `device`."""
        key = (self.implementation, device)
        if self._ops[0] != key:
            self._ops = key, tile_ops(*key)
        return self._ops[1]

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> Scratch:
        return memo.setdefault(id(self), Scratch(self.implementation, self.always))

    def __getstate__(self) -> dict[str, Any]:
        """What is lent out, and the module behind the operations, are not worth pickling."""
        return {**self.__dict__, "_buffers": {}, "_ops": (None, None)}


class FrozenLinear(nn.Module):
    """A Linear whose weight is dequantized into the shared scratch for each use.

    Stands in for quantized Linears that are not trained, so that none of bitsandbytes' own
    forwards runs in a leanlift model (its CPU path repacks the weight and then reads it wrongly).

    Args:
        base: the module that holds the frozen weight and bias; its own forward is never called.
        weight: the same weight as RowTiles, dequantized.
        scratch: shared by all layers of a model.

    Attributes:
        observer: if set, called in each backward pass with x [T, n] and grad_y [T, m], from which
            any part of the dense weight gradient can be formed; for calibration.

    The dtype of the computation is the one autocast asks for, else the dtype of x.
    """

    def __init__(self, base: nn.Module, weight: RowTiles, scratch: Scratch) -> None:
        super().__init__()
        self.base = base
        self.weight_tiles = weight
        self.scratch = scratch
        self.observer: Callable[[Tensor, Tensor], None] | None = None
        self.out_features, self.in_features = weight.shape

    @property
    def weight(self) -> Tensor:
        """The frozen weight as the base holds it, packed if it is 4-bit: some models ask for its
        dtype or device."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        return bias

    def forward(self, x: Tensor) -> Tensor:
        x = self._checked(x)
        return _Multiply.apply(x, self._carrier(x) if torch.is_grad_enabled() else None, self)

    def _carrier(self, x: Tensor) -> Tensor | None:
        """The thread to whoever needs x and grad_y in the backward pass; None if nobody does."""
        if self.observer is None:
            return None
        anchor = torch.zeros((), device=x.device, requires_grad=True)
        return _KeepInput.apply(x, anchor, self, self.observer)

    def effective_weight(self, dtype: torch.dtype) -> Tensor:
        """The effective weight [m, n], in the shared scratch: valid until its next use.

        On a CPU, a weight whose rows are new tensors is patched where it was dequantized: into a
        scratch it could only be copied.
        """
        source, m, n = self.weight_tiles, self.out_features, self.in_features
        device = source.device
        ops = self.scratch.ops(device)
        fresh = device.type == "cpu" and source.dtype == dtype and not self.scratch.always
        if not ops.whole and fresh and getattr(source, "fresh", False):
            weight = source.rows(0, m)
            for start, stop in row_ranges(m, tile_rows(n, 4, TILE_BYTES)):
                for store in self.offsets(start, stop):
                    add_offsets_(weight[start:stop], store)
            return weight
        weight = self.scratch.take(m, n, dtype, device)
        if ops.whole:
            ops.effective_rows(source, self.offsets(0, m), 0, m, weight)
            return weight
        for start, stop in row_ranges(m, tile_rows(n, 4, TILE_BYTES)):
            ops.effective_rows(source, self.offsets(start, stop), start, stop, weight[start:stop])
        return weight

    def offsets(self, start: int, stop: int) -> list[Offsets]:
        """The stores whose offsets lie in rows `start:stop`: none here."""
        return []

    @property
    def version(self) -> tuple[float, ...]:
        """Changes whenever the effective weight does."""
        return ()

    def _checked(self, x: Tensor) -> Tensor:
        """x in the dtype of the computation."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected an input [..., {self.in_features}], got {tuple(x.shape)}")
        if torch.is_autocast_enabled(x.device.type):
            return x.to(torch.get_autocast_dtype(x.device.type))
        return x

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


class LiftLinear(FrozenLinear):
    """A frozen Linear with trainable offsets at chosen positions.

    Args:
        base, weight, scratch: as for `FrozenLinear`.
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
        scratch: Scratch,
        values_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(base, weight, scratch)
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
        return _KeepInput.apply(x, self.values, self, self.values_gradient)

    def offsets(self, start: int, stop: int) -> list[Offsets]:
        """The active and the retired offsets of rows `start:stop`."""
        stores = [offsets_of(self.index, self.values.detach(), start, stop, self.scale)]
        if self.retired_index is not None and self.retired_values is not None:
            retired = self.retired_index, self.retired_values
            stores.append(offsets_of(*retired, start, stop, self.scale))
        return stores

    def add_offsets_(self, rows: Tensor, start: int, stop: int) -> None:
        """Add all offsets of rows `start:stop`, scaled, to `rows` [stop - start, n], in place."""
        for store in self.offsets(start, stop):
            add_offsets_(rows, store)

    @property
    def version(self) -> tuple[float, ...]:
        """Changes whenever the effective weight does."""
        return self.values._version, id(self.index), id(self.retired_values), self.scale

    def values_gradient(self, x: Tensor, grad_y: Tensor) -> Tensor:
        """d loss / d values [k] in their dtype, by row tiles, from x [T, n] and grad_y [T, m]."""
        m, n = self.out_features, self.in_features
        gradient = torch.empty_like(self.values)
        ops = self.scratch.ops(x.device)
        for start, stop in row_ranges(m, _gradient_rows(m, n, x)):
            part, rows, out = self.index.part(start, stop), grad_y, gradient
            if stop - start < m:
                first, last = self.index.span(start, stop)
                rows, out = grad_y[:, start:stop], gradient[first:last]
            ops.sampled_product(rows, x, part, out, self.scratch.take)
        return gradient if self.scale == 1 else gradient.mul_(self.scale)

    @torch.no_grad()
    def change_mask(self, flat: Tensor) -> MaskChange:
        """Make `flat` (sorted, distinct, as many as before) the active positions.

        The Parameter object stays the same; whoever holds state about its entries follows
        `MaskChange.source`.
        """
        if flat.numel() != self.index.count:
            raise ValueError(f"expected {self.index.count} positions, got {flat.numel()}")
        change = change_mask(self.index.to_flat(), self.values.detach(), flat, *self.retired())
        self.index = SegmentedIndex.from_flat(change.flat, self.index.shape)
        self.values.copy_(change.values)
        self.set_retired(change.retired_flat, change.retired_values)
        return change

    def set_retired(self, flat: Tensor, values: Tensor) -> None:
        """Replace the retired store by `values` at sorted, distinct positions `flat`.

        Raises:
            ValueError: a position that is trained: an entry has one offset.
        """
        empty = flat.numel() == 0
        if not empty and bool((find_positions(self.index.to_flat(), flat) >= 0).any()):
            raise ValueError("expected retired positions outside the mask, got one that is trained")
        self.retired_index = None if empty else SegmentedIndex.from_flat(flat, self.index.shape)
        self.retired_values = None if empty else values.to(self.values.device, self.values.dtype)

    def retired(self) -> tuple[Tensor, Tensor]:
        """Positions and offsets of the retired store, both empty where there is none."""
        if self.retired_index is None or self.retired_values is None:
            device = self.values.device
            return torch.empty(0, dtype=torch.int64, device=device), self.values.new_empty(0)
        return self.retired_index.to_flat(), self.retired_values

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


class _KeepInput(torch.autograd.Function):
    """Keeps x for the backward pass; `consume(x, grad_y)` forms the gradient of `parameter`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        parameter: Tensor,
        layer: FrozenLinear,
        consume: Callable[[Tensor, Tensor], Tensor | None],
    ) -> Tensor:
        ctx.layer, ctx.version, ctx.consume = layer, layer.version, consume
        ctx.save_for_backward(x)
        return x.new_empty(1).expand(*x.shape[:-1], layer.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[None, Tensor | None, None, None]:
        (x,) = ctx.saved_tensors
        layer: FrozenLinear = ctx.layer
        _check_unchanged(layer, ctx.version)
        grad_y = grad_y.reshape(-1, layer.out_features).to(x.dtype)
        return None, ctx.consume(x.reshape(-1, layer.in_features), grad_y), None, None


class _Multiply(torch.autograd.Function):
    """y = x W_eff^T + bias. Keeps nothing: W_eff is rebuilt for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, carrier: Tensor | None, layer: FrozenLinear) -> Tensor:
        ctx.layer, ctx.version, ctx.dtype = layer, layer.version, x.dtype
        bias = layer.bias
        weight = layer.effective_weight(x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_x = None
        _check_unchanged(ctx.layer, ctx.version)
        if ctx.needs_input_grad[0]:
            grad_x = grad_y.to(ctx.dtype) @ ctx.layer.effective_weight(ctx.dtype)
        return grad_x, grad_y if ctx.needs_input_grad[1] else None, None


def _gradient_rows(m: int, n: int, x: Tensor) -> int:
    """Rows of the values' gradient that are formed at once.

    On CUDA all: the scratch has room for any layer's weight, and one product is as fast as several
    whose results stay in the cache for the gather (`benchmarks/gpu_proof`). On a CPU, many: of most
    masks the entries alone are formed.
    """
    return m if x.device.type == "cuda" else tile_rows(n, 4, SAMPLED_TILE_BYTES)


def _check_unchanged(layer: FrozenLinear, version: tuple[float, ...]) -> None:
    """Nothing of the weight is saved for backward, so nobody else would notice a change."""
    if layer.version != version:
        raise RuntimeError(
            "the offsets of a leanlift layer changed between its forward and its backward pass: "
            "step the optimizer, load adapters and refresh masks only when no backward is pending"
        )
