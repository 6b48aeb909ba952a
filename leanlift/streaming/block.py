"""The tensors of a block that are streamed: a buffer of the host's, laid out like the device's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 256
"""Bytes at whose multiples a tensor begins, as the device's allocator has them."""


@dataclass(frozen=True)
class Place:
    """Where a tensor is read from: an attribute of an object, such as the data of a Parameter."""

    holder: Any
    name: str

    @property
    def tensor(self) -> Tensor:
        """What is there now."""
        found: Tensor = getattr(self.holder, self.name)
        return found

    def put(self, tensor: Tensor) -> None:
        """Let another one be read from there."""
        setattr(self.holder, self.name, tensor)


def nbytes_of(sizes: Iterable[int]) -> int:
    """Bytes of a buffer that holds tensors of these sizes."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


class Block:
    """Tensors that come and go together.

    Their contents are moved into one buffer of the host, pinned where a device shall copy from it
    while it computes; they are read from there until a buffer of the device holds them.

    Args:
        places: where they are read from.
        pin: whether to pin the buffer.
    """

    def __init__(self, places: Sequence[Place], pin: bool) -> None:
        self.places = tuple(places)
        sizes = [place.tensor.nbytes for place in self.places]
        self.nbytes = nbytes_of(sizes)
        self.host = torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=pin)
        self._looks = [(place.tensor.dtype, place.tensor.shape) for place in self.places]
        self._starts = [nbytes_of(sizes[:at]) for at in range(len(sizes))]
        self._views: dict[int, list[Tensor]] = {}
        for place, view in zip(self.places, self._in(self.host), strict=True):
            view.copy_(place.tensor)
        self.read_from(self.host)

    def start(self, place: int) -> int:
        """Where the tensor of a place begins in a buffer, in bytes; of one past the last, where the
        buffer ends."""
        return self._starts[place] if place < len(self._starts) else self.nbytes

    def read_from(self, buffer: Tensor) -> None:
        """Let all tensors be read from a buffer that holds them: the host's, or the device's."""
        for place, view in zip(self.places, self._in(buffer), strict=True):
            place.put(view)

    def _in(self, buffer: Tensor) -> list[Tensor]:
        """The tensors in a buffer; made once for each."""
        key = buffer.data_ptr()
        if key not in self._views:
            self._views[key] = [
                buffer[start : start + dtype.itemsize * shape.numel()].view(dtype).view(shape)
                for start, (dtype, shape) in zip(self._starts, self._looks, strict=True)
            ]
        return self._views[key]
