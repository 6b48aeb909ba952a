"""A batch of rows with images, as a processor has made it, in a step under fake tensors.

A tower asks for numbers: how many patches an image has, which tokens stand for them, which images
fill up a batch alone. Fake tensors have none. So what a batch holds keeps its numbers, and so does
what is computed of these alone: positions, masks, grids. Where they meet a weight of the model,
which is fake, a fake tensor comes of it, and of those the shapes are known. What is real is small
beside what is not, and counted like it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

IDS = "input_ids"
LABELS = "labels"
MASK = "attention_mask"


@dataclass(frozen=True)
class Seen:
    """What a processor makes of rows with images, all of it: ids, masks, pixels, grids.

    Attributes:
        rows: how many they are.
        name: shapes and a sum over the numbers: two of one name need the same bytes.
        tensors: by the names that the model gives them; without labels.
    """

    rows: int
    name: str
    tensors: dict[str, Tensor] = field(repr=False, compare=False)

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> Seen | None:
        """What a collator has made; None: it has no images, or is not on the CPU, which is not
        waited for."""
        held = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
        ids = held.pop(IDS, None)
        held.pop(LABELS, None)
        if ids is None or ids.dim() != 2 or ids.device.type != "cpu":
            return None
        beside = (value for value in held.values() if value.shape != ids.shape)  # no mask
        if not any(value.is_floating_point() for value in beside):
            return None
        tensors = {IDS: ids, **held}
        return cls(ids.shape[0], _name(tensors), tensors)

    @property
    def nbytes(self) -> int:
        """Of all of it."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def tokens(self) -> int:
        """Of a row."""
        return self.tensors[IDS].shape[1]

    @property
    def pixels(self) -> str:
        """The shape of the largest part of a row, in words."""
        largest = max(self.tensors.values(), key=lambda tensor: tensor.nbytes)
        return " × ".join(map(str, largest.shape))

    def inputs(self, rows: int, tokens: int, padded: bool = False) -> dict[str, Tensor]:
        """A batch of so many rows of so many tokens, of rows like these: the last token, one of
        text, is repeated, or the last row ends in one that pads."""
        with unset_fake_temporarily():
            made = {key: self._input(held, rows, tokens) for key, held in self.tensors.items()}
            if padded and MASK in made:
                made[MASK] = made[MASK].clone()
                made[MASK][-1, -1] = 0
        return made

    def _input(self, tensor: Tensor, rows: int, tokens: int) -> Tensor:
        shape = self.tensors[IDS].shape
        if tensor.shape == shape and tokens > shape[1]:
            more = tensor[:, -1:].expand(-1, tokens - shape[1])
            tensor = torch.cat([tensor, more], dim=1)
        return tensor.repeat(rows // self.rows, *[1] * (tensor.dim() - 1))


def _name(tensors: Mapping[str, Tensor]) -> str:
    shapes = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in sorted(tensors.items()))
    numbers = 0
    for _, tensor in sorted(tensors.items()):
        if not tensor.is_floating_point():
            numbers = zlib.crc32(tensor.contiguous().numpy().tobytes(), numbers)
    return f"{shapes}, {numbers:08x}"


# --- numbers beside fake tensors ----------------------------------------------------------------

COUNTING = {"arange", "linspace", "scalar_tensor"}
"""What makes numbers of numbers, of whatever dtype."""

CHOOSING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index",
            "_unsafe_index_put"}  # fmt: skip
"""What may choose by a mask: of a fake tensor it would not be known how much is chosen."""


@contextmanager
def keeping_numbers(wanted: bool = True) -> Iterator[None]:
    """Operations on real tensors alone stay real, under fake tensors."""
    if not wanted:
        yield
        return
    with _Numbers():
        yield


class _Numbers(TorchDispatchMode):
    """Runs what has no fake tensor among its arguments, and what counts, as it is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        given = [*_tensors((args, kwargs))]
        if any(isinstance(tensor, FakeTensor) for tensor in given):
            if name in CHOOSING and len(args) > 1:
                args = (args[0], _positions(args[1]), *args[2:])
            elif name == "masked_select" and not isinstance(args[1], FakeTensor):
                whole = args[0].expand(torch.broadcast_shapes(args[0].shape, args[1].shape))
                return whole[args[1].expand(whole.shape)]
            return func(*args, **kwargs)
        if not given and name not in COUNTING and not _counts(kwargs.get("dtype")):
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)


def _counts(dtype: torch.dtype | None) -> bool:
    return dtype is not None and not dtype.is_floating_point and not dtype.is_complex


def _positions(chosen: Any) -> Any:
    """Indices with each real mask as the positions that it has set."""
    made: list[Any] = []
    for index in chosen:
        masks = isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
        if masks and not isinstance(index, FakeTensor):
            with unset_fake_temporarily():
                made += index.nonzero().unbind(1)
        else:
            made.append(index)
    return made


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for part in tree:
            yield from _tensors(part)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))
