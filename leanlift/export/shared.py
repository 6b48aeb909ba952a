"""What several tensors of a checkpoint share, made once: the stacks that its experts are.

Where a checkpoint has a tensor for each expert's matrix, a merge comes back to the same stack, and
its offsets, hundreds of times; tensors of one stack and of another come by turns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from leanlift.adapters import Adapter
from leanlift.export.identity import Places
from leanlift.sparse import LayerOffsets
from leanlift.tiles import CastTiles, RowTiles
from leanlift.weights.quantized import dtype_of, requantize

Made = TypeVar("Made")


class LastTwo(Generic[Made]):
    """What is made of a module, of which the last two are kept.

    Args:
        make: it, by the module's name.
    """

    def __init__(self, make: Callable[[str], Made]) -> None:
        self.make = make
        self._last: dict[str, Made] = {}

    def of(self, module: str) -> Made:
        """Made, or as it was made."""
        if module not in self._last:
            while len(self._last) > 1:
                self._last.pop(next(iter(self._last)))
            self._last[module] = self.make(module)
        return self._last[module]


@dataclass(frozen=True)
class Shared:
    """What tensors of a checkpoint share.

    Attributes:
        quantized: D(Q) of its matrices, quantized as they were at loading.
        layers: the offsets of each.
    """

    quantized: LastTwo[RowTiles]
    layers: LastTwo[LayerOffsets]

    @classmethod
    def of(cls, adapter: Adapter, plan: Places) -> Shared:
        """Of the checkpoint whose matrices are where `plan` says."""
        return cls(_requantized(adapter, plan), LastTwo(adapter.layer))


def _requantized(adapter: Adapter, plan: Places) -> LastTwo[RowTiles]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def make(module: str) -> RowTiles:
        matrix: RowTiles = plan.matrices[module]  # type: ignore[assignment]
        loaded = CastTiles(matrix, dtype_of(adapter.base.dtype))
        return requantize(loaded, adapter.base.formats[module], device)

    return LastTwo(make)
