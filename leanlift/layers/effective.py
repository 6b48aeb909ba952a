"""The effective weight of a layer: its rows in fp32, and all of it for losses that need it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from leanlift.layers.frozen import dense
from leanlift.layers.once import once
from leanlift.sparse import SegmentedIndex
from leanlift.tiles import RowTiles


class Layer(Protocol):
    """What is asked of a layer: as of `LiftLinear`."""

    index: SegmentedIndex
    scale: float

    @property
    def weight_tiles(self) -> RowTiles:
        """The frozen weight."""

    @property
    def effective(self) -> RowTiles:
        """W_eff."""

    def add_offsets_(self, rows: Tensor, start: int, stop: int) -> None:
        """Add the offsets of rows `start:stop` to them."""


class EffectiveTiles:
    """The effective weight of a LiftLinear, read by rows in fp32 without touching the scratch."""

    dtype = torch.float32

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.weight_tiles.shape

    @property
    def device(self) -> torch.device:
        return self.layer.weight_tiles.device

    def rows(self, start: int, stop: int) -> Tensor:
        rows = self.layer.weight_tiles.rows(start, stop).to(torch.float32, copy=True)
        self.layer.add_offsets_(rows, start, stop)
        return rows


class HeadWeight(torch.autograd.Function):
    """The effective weight [m, n] of a layer, in the dtype of its base."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, layer: Layer) -> Tensor:
        ctx.index, ctx.dtype, ctx.scale = layer.index, values.dtype, layer.scale
        return dense(layer.effective, layer.weight_tiles.dtype)

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        gradient = grad.reshape(-1)
        if not ctx.index.is_full:
            gradient = gradient[ctx.index.to_flat()]
        gradient = gradient.to(ctx.dtype)
        return (gradient if ctx.scale == 1 else gradient * ctx.scale), None
