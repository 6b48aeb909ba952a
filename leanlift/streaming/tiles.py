"""A weight whose block is brought to the device when its rows are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leanlift.streaming.pool import Pool
from leanlift.tiles import makes_new_rows


@dataclass(frozen=True)
class Streamed:
    """A weight in a block of a pool; all else is that of the weight itself.

    Attributes:
        held: the weight.
        pool: what brings it.
        block: its block.
    """

    held: Any
    pool: Pool
    block: int

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        m, n = self.held.shape
        return m, n

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows that are read."""
        dtype: torch.dtype = self.held.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Where they are then."""
        return self.pool.device

    @property
    def fresh(self) -> bool:
        """Whether rows are new tensors."""
        return makes_new_rows(self.held)

    @property
    def module(self) -> Any:
        """The module that holds the weight."""
        return self.held.module

    @property
    def format(self) -> Any:
        """How the weight is stored."""
        return self.held.format

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start:stop`; views of a buffer are right until another block is read."""
        self.pool.need(self.block)
        rows: Tensor = self.held.rows(start, stop)
        return rows


@dataclass(frozen=True)
class StreamedPacked(Streamed):
    """One that kernels dequantize themselves."""

    def stored(self) -> Any:
        """Packed numbers and scales, in a buffer."""
        self.pool.need(self.block)
        return self.held.stored()


@dataclass(frozen=True)
class StreamedStack(Streamed):
    """The rows of a stack of matrices."""

    @property
    def parts(self) -> int:
        """How many matrices it is a stack of."""
        parts: int = self.held.parts
        return parts


def streamed(held: Any, pool: Pool, block: int) -> Streamed:
    """A weight of a block of a pool."""
    if hasattr(held, "parts"):
        return StreamedStack(held, pool, block)
    return (StreamedPacked if hasattr(held, "stored") else Streamed)(held, pool, block)
