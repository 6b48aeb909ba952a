"""How many bytes of tensors are alive, without an allocator to ask.

On CUDA the allocator knows. On a CPU nothing does, so while `LiveBytes` is active it follows
every storage that a torch operation creates until it is freed, and keeps the peak. Each
operation costs some microseconds more meanwhile.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

MAPS = Path("/proc/self/maps")
DEVICE = torch.ops.prim.device.default
"""What torch asks a fake tensor more often than all else."""


class LiveBytes(TorchDispatchMode):
    """Counts bytes of storages created while active: `current` and `peak`.

    Storages that existed before are not counted, nor is growth of theirs; nor are storages that
    are a mapped file (a checkpoint being read): those bytes are on disk, and the kernel takes their
    pages back when it needs them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE:
            return args[0].device
        out = func(*args, **(kwargs or {}))
        if _is_alias(func):
            return out
        given = None
        for leaf in _tensors(out):
            if leaf.is_meta:
                continue  # a skeleton without memory; fake tensors name the device they stand for
            for storage in _storages(leaf):
                if storage._cdata in self._known:
                    continue
                if given is None:
                    given = {s._cdata for part in _tensors((args, kwargs)) for s in _storages(part)}
                if storage._cdata not in given:
                    self._follow(storage)
        return out

    def allow(self, nbytes: int) -> None:
        """Take so many bytes more to be alive for a moment."""
        self.peak = max(self.peak, self.current + nbytes)

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if _is_mapped_file(storage):
            return
        nbytes = storage.nbytes()
        self._known[storage._cdata] = weakref.ref(
            storage, partial(self._release, storage._cdata, nbytes)
        )
        self.current += nbytes
        self.peak = max(self.peak, self.current)

    def _release(self, known: int, nbytes: int, _: Any) -> None:
        del self._known[known]
        self.current -= nbytes


@cache
def _is_alias(func: Any) -> bool:
    """Whether all that an operation returns is memory that it was given, as its schema says: views,
    and what works in place. Of one that is made of others the schema does not say; and a constant
    that is lifted becomes a fake tensor of its own under fake tensors."""
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    results = func._schema.returns
    return (
        bool(results)
        and all(result.alias_info is not None for result in results)
        and not func.has_kernel_for_dispatch_key(composite)
        and func is not torch.ops.aten.lift_fresh.default
    )


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in what an operation takes or gives: several times faster than a pytree's leaves,
    in tuples, lists and dicts alone."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for part in tree:
            yield from _tensors(part)
    elif isinstance(tree, dict):
        for part in tree.values():
            yield from _tensors(part)


def _storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """What holds a tensor's bytes: two storages where it is sparse."""
    if tensor.layout == torch.sparse_coo:
        return [part.untyped_storage() for part in (tensor._indices(), tensor._values())]
    return [tensor.untyped_storage()]


def _is_mapped_file(storage: torch.UntypedStorage) -> bool:
    """Whether a storage is a mapping of a file, as those of an open safetensors file are."""
    if storage.device.type != "cpu" or storage.resizable() or not MAPS.is_file():
        return False  # memory from an allocator can be resized, a mapping cannot
    address = storage.data_ptr()
    for line in MAPS.read_text().splitlines():
        span, _, _, _, inode, *_ = line.split()
        start, _, stop = span.partition("-")
        if int(start, 16) <= address < int(stop, 16):
            return inode != "0"
    return False
