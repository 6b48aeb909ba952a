"""The frozen embedding of a language model, in 16 or 32 bits or in INT8, or on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from leanlift.layers.frozen import take_packed
from leanlift.layers.untraced import untraced
from leanlift.tiles import RowTiles


class FrozenEmbedding(nn.Module):
    """An embedding in 16 or 32 bits or in INT8, on the model's device or on the CPU.

    Args:
        storage: looks rows up; see `quantized.embedding_rows`.
        dtype: of what comes out.
        stays: True leaves the storage where it is, whatever the model is moved to.
        scale: scalar that rows are multiplied by, as Gemma does.
        weight_tiles: the weight as RowTiles, where somebody needs it.
    """

    def __init__(
        self,
        storage: nn.Module,
        rows: Any,
        dtype: torch.dtype,
        stays: bool,
        scale: Tensor | None = None,
        weight_tiles: RowTiles | None = None,
    ) -> None:
        super().__init__()
        self._rows = rows
        self.dtype = dtype
        self.weight_tiles = weight_tiles
        self.register_buffer("embed_scale", scale, persistent=False)
        if stays:
            self.__dict__["storage"] = storage  # unknown to nn.Module, so that .to() passes it by
        else:
            self.storage = storage

    @property
    def weight(self) -> Tensor:
        """The weight as the storage holds it."""
        weight: Tensor = self.storage.weight  # type: ignore[assignment]
        return weight

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any
    ) -> None:
        """As of any module; what is packed is there already, and stays."""
        begin = f"{prefix}storage."
        take_packed(self.storage, begin, state_dict, local_metadata, rest[1], rest[-1])
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    @untraced
    def forward(self, ids: Tensor) -> Tensor:
        """[..., d] for ids [...], on the device of `ids`."""
        held = self.weight.device
        rows: Tensor = self._rows(self.storage, ids.to(held))
        rows = rows.to(self.dtype).to(ids.device)
        scale: Tensor | None = self.embed_scale  # type: ignore[assignment]
        return rows if scale is None else rows * scale.to(self.dtype)
