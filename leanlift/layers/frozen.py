"""A frozen Linear whose weight is made for each use."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanlift.layers.autograd import KeepInput, Multiply
from leanlift.layers.cpu_product import part_of, rows_at_once, times, times_turned
from leanlift.layers.untraced import untraced
from leanlift.layers.workspace import Scratch, Workspace, needs_scratch
from leanlift.ops import TileOps
from leanlift.sparse import Offsets, add_offsets_
from leanlift.streaming import STREAMED
from leanlift.tiles import RowTiles, makes_new_rows, part_shape, row_ranges, tile_rows

TILE_BYTES = 16 * 2**20
"""Of fp32 rows that are read, patched or formed at once: the decoded positions of a tile, and the
like, are a few times its entries."""


def dense(tiles: RowTiles, dtype: torch.dtype) -> Tensor:
    """All rows [m, n] in a dtype, made by tiles."""
    m, n = tiles.shape
    whole = torch.empty(m, n, dtype=dtype, device=tiles.device)
    for start, stop in row_ranges(m, tile_rows(n, 4, TILE_BYTES)):
        whole[start:stop] = tiles.rows(start, stop)
    return whole


def patched_rows(n: int) -> int:
    """Rows of n entries to which offsets are added at once."""
    return tile_rows(n, 4, TILE_BYTES)


class Observer(Protocol):
    """Sees what the dense gradient of a weight is formed from."""

    def __call__(self, x: Tensor, grad_y: Tensor, first: int = 0) -> None:
        """grad_y [T, r]^T @ x [T, n] is added to rows `first:first + r` of the gradient."""


class FrozenLinear(nn.Module):
    """A Linear whose weight is dequantized into the shared scratch for each use.

    Stands in for quantized Linears that are not trained, so that none of bitsandbytes' own
    forwards runs in a leanlift model (its CPU path repacks the weight and then reads it wrongly).

    Args:
        base: the module that holds the frozen weight and bias; its own forward is never called.
        weight: the same weight as RowTiles, dequantized.
        workspace: shared by all layers of a model.

    Attributes:
        observer: if set, called in each backward pass; for calibration.
        is_head: whether it is the output head, with whose weight some losses multiply themselves.

    The dtype of the computation is the one autocast asks for, else the dtype of x.
    """

    def __init__(self, base: nn.Module, weight: RowTiles, workspace: Workspace) -> None:
        super().__init__()
        self.base = base
        self.weight_tiles = weight
        self.workspace = workspace
        self._fresh = makes_new_rows(weight)
        self.observer: Observer | None = None
        self.is_head = False
        self.out_features, self.in_features = weight.shape

    @property
    def weight(self) -> Tensor:
        """The frozen weight where the base holds it as numbers. Where it is packed, a stand-in that
        has its shape, dtype and device, for which some models ask, and NaN in the place of its
        numbers: packed bytes would be taken for some. Of a head its numbers, made anew."""
        weight: Any = self.base.weight
        if weight.dtype.is_floating_point:
            if hasattr(weight, STREAMED):
                pool, block = getattr(weight, STREAMED)
                pool.need(block)
            return weight  # type: ignore[no-any-return]
        if self.is_head:
            return dense(self.weight_tiles, self.weight_tiles.dtype)
        tiles = self.weight_tiles
        return torch.full((), torch.nan, dtype=tiles.dtype, device=tiles.device).expand(tiles.shape)

    @property
    def bias(self) -> Tensor | None:
        """The bias [m] of the Linear that it took the place of."""
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        return bias

    @untraced
    def forward(self, x: Tensor) -> Tensor:
        x = self._checked(x)
        return Multiply.apply(x, self._carrier(x) if torch.is_grad_enabled() else None, self)

    def _carrier(self, x: Tensor) -> Tensor | None:
        """The thread to whoever needs x and grad_y in the backward pass; None if nobody does."""
        if self.observer is None:
            return None
        anchor = torch.zeros((), device=x.device, requires_grad=True)
        return KeepInput.apply(x, anchor, self, self.observer)

    def product(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """x W_eff^T + bias, in the dtype of x; `weight`: W_eff in it, where it is there."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.multiplies_by_tiles:
            y = x.new_empty(*x.shape[:-1], self.out_features)
            times_turned(x, self._rows_for(x, weight), y, bias)
            return y
        return F.linear(x, self.effective_weight(x.dtype) if weight is None else weight, bias)

    def product_back(self, grad_y: Tensor, weight: Tensor | None = None) -> Tensor:
        """The gradient of x, in the dtype of that of y."""
        if self.multiplies_by_tiles:
            grad_x = grad_y.new_empty(*grad_y.shape[:-1], self.in_features)
            times(grad_y, self._rows_for(grad_y, weight), grad_x)
            return grad_x
        return grad_y @ (self.effective_weight(grad_y.dtype) if weight is None else weight)

    def _rows_for(self, factor: Tensor, weight: Tensor | None) -> Callable[[int, int], Tensor]:
        """Rows to multiply with, made as they are asked for, or of a weight that is there."""
        if weight is None:
            return lambda start, stop: self.effective_rows(start, stop, factor.dtype)
        return part_of(weight)

    @property
    def multiplies_by_tiles(self) -> bool:
        """Whether products make no weight but tiles of one: on a CPU, where the weight is not there
        as numbers (one that is only brought is multiplied with as a stock Linear does)."""
        on_cpu = (self.workspace.stands_for or self.weight_tiles.device.type) == "cpu"
        is_made = self._fresh or type(self) is not FrozenLinear
        return on_cpu and is_made and not self._ops().whole

    def lasting_weight(self, dtype: torch.dtype) -> Tensor:
        """The effective weight [m, n], in no memory that the next one is made in."""
        return self.effective_rows(0, self.out_features, dtype, lasting=True)

    def effective_weight(self, dtype: torch.dtype) -> Tensor:
        """The effective weight [m, n]; see `effective_rows`."""
        return self.effective_rows(0, self.out_features, dtype)

    def effective_rows(
        self, first: int, last: int, dtype: torch.dtype, lasting: bool = False
    ) -> Tensor:
        """Rows `first:last` of the effective weight, valid until the next one is made, if not
        `lasting`: in the shared scratch, or where they were dequantized (see `needs_scratch`)."""
        if self.workspace.stand_in is not None:
            return self.workspace.stand_in.rows(self, first, last, dtype, lasting)
        return self.made_rows(first, last, dtype, lasting)

    def made_rows(self, first: int, last: int, dtype: torch.dtype, lasting: bool = False) -> Tensor:
        """The same, made by the layer itself."""
        source, n = self.weight_tiles, self.in_features
        if not self.needs_scratch(dtype):
            weight = source.rows(first, last)
            for start, stop in row_ranges(last - first, patched_rows(n)):
                for store in self.offsets(first + start, first + stop):
                    add_offsets_(weight[start:stop], store)
            return weight
        ops = self._ops()
        if lasting:
            weight = torch.empty(last - first, n, dtype=dtype, device=source.device)
        else:
            weight = self.scratch.take(last - first, n, dtype, source.device)
        if ops.whole:
            ops.effective_rows(source, self.offsets(first, last), first, last, weight)
            return weight
        for start, stop in row_ranges(last - first, patched_rows(n)):
            rows = first + start, first + stop
            ops.effective_rows(source, self.offsets(*rows), *rows, weight[start:stop])
        return weight

    @property
    def made_at_once(self) -> tuple[int, int]:
        """The shape of as much of the effective weight as products make at once."""
        m, n = part_shape(self.weight_tiles)
        return (min(m, rows_at_once(n)) if self.multiplies_by_tiles else m), n

    def needs_scratch(self, dtype: torch.dtype) -> bool:
        """Whether the effective weight in `dtype` is made in the shared scratch. Operations that
        write a whole matrix at once always write it there."""
        source = self.weight_tiles
        if self._ops().whole:
            return True
        device_type = self.workspace.stands_for or source.device.type
        return needs_scratch(self._fresh, source.dtype, dtype, device_type)

    def _ops(self) -> TileOps:
        """What computes in this layer."""
        return self.workspace.ops or self.workspace.choose(self.weight_tiles.device)

    @property
    def scratch(self) -> Scratch:
        """The buffer that all layers of the model share."""
        return self.workspace.scratch

    def offsets(self, start: int, stop: int) -> Sequence[Offsets]:
        """The stores whose offsets lie in rows `start:stop`: none here."""
        return ()

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

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        begin = f"{prefix}base."
        take_packed(self.base, begin, state_dict, local_metadata, missing_keys, error_msgs)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        with self.without_streamed():
            super()._apply(fn, recurse)
        self.workspace.moved()
        return self

    @contextmanager
    def without_streamed(self) -> Iterator[None]:
        """The layer without a weight that a pool brings: it stays where it is."""
        weight = self.base._parameters.get("weight")
        if not hasattr(weight, STREAMED):
            yield
            return
        try:
            self.base._parameters["weight"] = None
            yield
        finally:
            self.base._parameters["weight"] = weight


def take_packed(
    module: nn.Module,
    prefix: str,
    state_dict: dict[str, Any],
    local_metadata: Mapping[str, Any],
    missing_keys: list[str],
    error_msgs: list[str],
) -> None:
    """What a state dict has of a packed weight, for a module that holds it: the same numbers are
    there already, and stay. The tensors by which they are told, which the module does not load
    itself, are taken out of the state dict; others than its own are an error."""
    own = module.state_dict(prefix=prefix)
    weight, bias = f"{prefix}weight", f"{prefix}bias"
    if not own.keys() - {weight, bias}:
        return
    if weight in state_dict and local_metadata.get("assign_to_params_buffers"):
        error_msgs.append(f"{weight} is packed: load it without assign=True")
    for key in own.keys() - {bias}:
        given = state_dict.get(key) if key == weight else state_dict.pop(key, None)
        if given is None and key != weight:
            missing_keys.append(key)
        elif given is not None and not _same(own[key], given):
            error_msgs.append(f"{key}: expected the numbers of the base that is loaded")


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other.to(one))


def largest_in_scratch(layers: Iterable[FrozenLinear], dtype: torch.dtype) -> FrozenLinear | None:
    """Of the layers that make their weight in the scratch when they compute in `dtype`, the one
    that makes the most entries at once; None: none does."""
    needing = [layer for layer in layers if layer.needs_scratch(dtype)]
    return max(needing, key=lambda layer: math.prod(layer.made_at_once), default=None)


def scratch_nbytes(layers: Iterable[FrozenLinear], dtype: torch.dtype) -> int:
    """Bytes of the scratch that these layers share, after each has computed in `dtype`."""
    largest = largest_in_scratch(layers, dtype)
    return 0 if largest is None else dtype.itemsize * math.prod(largest.made_at_once)
