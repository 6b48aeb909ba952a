"""What it takes to compute something once more in a backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def leaf_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Where a graph of its own begins, and what to compute with: the same numbers as x, and a view
    of them. Where torch follows modules (`FlopCounterMode`), none may be given the leaf itself."""
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        return leaf, leaf.view_as(leaf)


class Autocast:
    """What a backward pass has to know of the autocast of its forward pass."""

    def __init__(self, kind: str, enabled: bool, dtype: torch.dtype) -> None:
        self.kind, self.enabled, self.dtype = kind, enabled, dtype

    @classmethod
    def of(cls, x: Tensor) -> Autocast:
        """As it is now, on the device of x."""
        kind = x.device.type
        return cls(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    def again(self) -> Any:
        """As it was then."""
        return torch.autocast(self.kind, dtype=self.dtype, enabled=self.enabled)

    def computed(self, dtype: torch.dtype) -> torch.dtype:
        """In which a product of tensors of `dtype` is computed."""
        return self.dtype if self.enabled else dtype


class Waiting(dict[Any, Any]):
    """What was made again while a block is recomputed, until its backward pass takes it. Copies and
    pickles are empty."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Waiting:
        return memo.setdefault(id(self), Waiting())

    def __reduce__(self) -> tuple[type[Waiting], tuple[()]]:
        return Waiting, ()


@contextmanager
def kept_here() -> Iterator[None]:
    """What a piece keeps for its backward pass lives for a moment: nobody shall move it away."""
    with saved_tensors_hooks(Tensor.detach, lambda tensor: tensor):
        yield
