"""The matrices of a 16-bit checkpoint as a quantized base had them."""

from __future__ import annotations

import torch

from leanlift.adapters import Adapter
from leanlift.export.identity import Places
from leanlift.tiles import CastTiles, RowTiles
from leanlift.weights.quantized import dtype_of, requantize


class Requantized:
    """D(Q) of matrices of the checkpoint, quantized as they were at loading.

    The last two are kept: of a mixture, tensors of one stack and of another come by turns.

    Args:
        adapter: whose base it was.
        plan: where its matrices are.
    """

    def __init__(self, adapter: Adapter, plan: Places) -> None:
        self.adapter = adapter
        self.plan = plan
        self._last: dict[str, RowTiles] = {}

    def of(self, module: str) -> RowTiles:
        """The matrix of a module."""
        if module not in self._last:
            while len(self._last) > 1:
                self._last.pop(next(iter(self._last)))
            self._last[module] = self._made(module)
        return self._last[module]

    def _made(self, module: str) -> RowTiles:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        matrix: RowTiles = self.plan.matrices[module]  # type: ignore[assignment]
        loaded = CastTiles(matrix, dtype_of(self.adapter.base.dtype))
        return requantize(loaded, self.adapter.base.formats[module], device)
