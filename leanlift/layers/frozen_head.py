"""An output head whose weight is dequantized a tile at a time, also for whole logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from leanlift.layers.frozen import dense, take_packed
from leanlift.layers.lm_head import TILE_BYTES, Head
from leanlift.layers.once import once
from leanlift.layers.untraced import untraced
from leanlift.tiles import RowTiles, row_ranges


class FrozenHead(nn.Module):
    """An output head whose weight is dequantized a tile at a time, also for whole logits.

    Args:
        base: the module that holds weight and bias; its own forward is never called.
        weight: the same weight as RowTiles.
        bias: of the head.
        dtype: of the weight as numbers; None: that of the tiles.

    Attributes:
        stands_for: as of `Head`.
    """

    def __init__(
        self,
        base: nn.Module,
        weight: RowTiles,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dtype = dtype or weight.dtype
        self.base = base
        self.weight_tiles = weight
        self.stands_for: str | None = None
        self.register_buffer("bias", bias, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The weight [V, d] as numbers, made anew: some losses multiply with it themselves."""
        return dense(self.weight_tiles, self.dtype)

    @property
    def in_features(self) -> int:
        """n: the width of the hidden states."""
        return self.weight_tiles.shape[1]

    @property
    def out_features(self) -> int:
        """m: the rows of the vocabulary."""
        return self.weight_tiles.shape[0]

    @untraced
    def forward(self, x: Tensor) -> Tensor:
        """Logits [..., V] in the dtype of the computation."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias: Tensor | None = self.bias  # type: ignore[assignment]
        return _TiledLinear.apply(x, Head(self.weight_tiles, bias, stands_for=self.stands_for))

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any
    ) -> None:
        """As of any module; what is packed is there already, and stays."""
        begin = f"{prefix}base."
        take_packed(self.base, begin, state_dict, local_metadata, rest[1], rest[-1])
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


class _TiledLinear(torch.autograd.Function):
    """y = x W^T + bias, W read by row tiles, in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Head) -> Tensor:
        ctx.head, ctx.dtype = head, x.dtype
        flat = x.reshape(-1, x.shape[-1])
        out = x.new_empty(flat.shape[0], head.weight.shape[0])
        for start, stop, rows in _tiles(head, x.dtype):
            out[:, start:stop] = head.product(flat, rows)
        out = out.view(*x.shape[:-1], -1)
        return out if head.bias is None else out.add_(head.bias.to(out.dtype))

    @staticmethod
    @once
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        head: Head = ctx.head
        flat, n = grad_y.reshape(-1, grad_y.shape[-1]), head.weight.shape[1]
        wide = torch.promote_types(ctx.dtype, torch.float32)
        grad_x = torch.zeros(flat.shape[0], n, dtype=wide, device=grad_y.device)
        for start, stop, rows in _tiles(head, ctx.dtype):
            head.add_product_back(flat[:, start:stop].to(ctx.dtype), rows, grad_x)
        return grad_x.to(ctx.dtype).view(*grad_y.shape[:-1], n), None


def _tiles(head: Head, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    m, n = head.weight.shape
    for start, stop in row_ranges(m, max(64, TILE_BYTES // (4 * n))):
        yield start, stop, head.rows(start, stop, dtype)
