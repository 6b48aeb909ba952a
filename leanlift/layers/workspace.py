"""What the layers of one model share: the operations that compute in them, and a scratch buffer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from leanlift.layers.again import Waiting
from leanlift.ops import TileOps, tile_ops


class StandIn(Protocol):
    """What makes weights and their gradients in the place of the layers: see `Workspace`."""

    def rows(self, layer: Any, first: int, last: int, dtype: torch.dtype, lasting: bool) -> Tensor:
        """As `FrozenLinear.made_rows`."""

    def gradient(self, layer: Any, left: Tensor, right: Tensor, first: int, out: Tensor) -> None:
        """As `LiftLinear.formed_gradient`."""


def needs_scratch(fresh: bool, stored: torch.dtype, dtype: torch.dtype, device_type: str) -> bool:
    """Whether an effective weight in `dtype` is made in the scratch. On a CPU, where rows of that
    dtype are new tensors, it is made where its base is dequantized: into the scratch those could
    only be copied. The one place where this is decided; `FrozenLinear.needs_scratch` asks it.

    Args:
        fresh: whether rows are new tensors; see `tiles.makes_new_rows`.
        stored: the dtype of the rows.
        dtype: of the computation.
        device_type: "cpu", "cuda".
    """
    return not (fresh and stored == dtype and device_type == "cpu")


class Scratch:
    """One growing buffer per dtype and device, lent to whoever computes right now.

    A view is valid until the next `take`. One per model: models do not disturb each other.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def take(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialized contiguous [rows, columns] view."""
        key, numel = (dtype, device), rows * columns
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < numel:
            self._buffers.pop(key, None)
            with torch.inference_mode(False):  # or training could never write to it again
                buffer = self._buffers[key] = torch.empty(numel, dtype=dtype, device=device)
        return buffer[:numel].view(rows, columns)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> Scratch:
        return memo.setdefault(id(self), Scratch())

    def __getstate__(self) -> dict[str, Any]:
        """What is lent out is not worth pickling."""
        return {"_buffers": {}}


class Workspace:
    """What the layers of one model compute with.

    The operations are chosen when a layer computes for the first time, and again after the model
    has moved or `use` has named others; until then every layer finds them here.

    Args:
        implementation: one of `ops.IMPLEMENTATIONS` (see `ops.tile_ops`); or the operations.
        stands_for: the kind of device that the layers are taken to be on, "cpu" or "cuda"; None:
            the one that they are on. For a plan, whose tensors are on none.

    Attributes:
        implementation: the name.
        ops: what was chosen; None: it is to be chosen.
        stand_in: makes weights and gradients in the place of the layers, in a plan, which has seen
            one like them; None: they make their own.
        scratch: where weights are made.
        reuses_weights: whether a weight that is made to compute something again in the backward
            pass waits for the product there.
        waiting: those that do, by layer (its id), whether it is off, and dtype.
        products: inputs of layers (their ids) that were made again in the backward pass, as
            `kept_factors` has it.
        off: whether the layers compute as without an adapter, where a thread has not said
            otherwise with `without_offsets`.
    """

    _threads: threading.local

    def __init__(
        self, implementation: str | TileOps = "auto", stands_for: str | None = None
    ) -> None:
        self._given = None if isinstance(implementation, str) else implementation
        self.implementation = (
            implementation if isinstance(implementation, str) else implementation.name
        )
        self.stands_for = stands_for
        self.ops: TileOps | None = self._given
        self.stand_in: StandIn | None = None
        self.scratch = Scratch()
        self.off = self.reuses_weights = False
        self.waiting, self.products = Waiting(), Waiting()
        self._threads = threading.local()

    @property
    def is_off(self) -> bool:
        """Whether the layers compute in this thread as without an adapter."""
        return getattr(self._threads, "is_off", self.off)

    @contextmanager
    def without_offsets(self, is_off: bool = True) -> Iterator[None]:
        """Let the layers compute, in this thread, as without an adapter; or with it, if not
        `is_off`. What a backward pass does is decided in its forward pass."""
        before = dict(vars(self._threads))
        self._threads.is_off = is_off
        try:
            yield
        finally:
            vars(self._threads).clear()
            vars(self._threads).update(before)

    def use(self, implementation: str) -> None:
        """Let other operations compute from now on, by name."""
        self.implementation, self._given, self.ops = implementation, None, None

    def moved(self) -> None:
        """The layers are on another device, perhaps: what "auto" means there is to be chosen."""
        self.ops = self._given

    def choose(self, device: torch.device) -> TileOps:
        """Choose what computes on `device`, and keep it.

        Raises:
            UserError: an unknown name, or "triton" where it cannot run.
        """
        self.ops = tile_ops(self.implementation, device)
        return self.ops

    def __deepcopy__(self, memo: dict[int, Any]) -> Workspace:
        given = self._given or self.implementation
        return memo.setdefault(id(self), Workspace(given, self.stands_for))

    def __getstate__(self) -> dict[str, Any]:
        """Without the module behind the operations."""
        return {
            **self.__dict__,
            "ops": self._given,
            "stand_in": None,
            "_threads": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _threads=threading.local())
