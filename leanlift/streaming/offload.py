"""What autograd keeps for the backward pass, waiting for it in the host's memory.

A tensor is copied to the host as it is kept, and leaves the device when the next one is kept: its
copy has had a block's time until then. In the backward pass the one before is brought back as soon
as one is asked for, so that it is there when its turn comes. With recomputation what is kept is the
input of each block, and two of them at most are on the device beside the pass itself.

On CUDA the copies have a stream of their own, and both sides wait for events, on the device alone.
Pinned memory is taken once and used again from step to step. A tensor that is brought back is new
memory, and its owner is whoever asked: nothing is overwritten that somebody still holds. On a CPU
the same is done with plain copies, and in a plan without any host.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

LEAST = 1024
"""Bytes from which a tensor is moved."""


class Nowhere:
    """Where tensors go in a plan: into no memory. What comes back is new memory all the same."""

    def out(self, held: Held, tensor: Tensor) -> Any:
        """Copy a tensor to the host; gives an event behind the copy, or None."""
        return None

    def back(self, held: Held, into: Tensor) -> Any:
        """Copy it back; gives the same."""
        return None

    def wait(self, event: Any) -> None:
        """Let what computes from now on do so behind an event."""


class Host(Nowhere):
    """The host's memory.

    Args:
        device: where tensors come from.

    Attributes:
        free: buffers with nobody's numbers in them, by their bytes.
        nbytes: of all buffers.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.free: dict[int, list[Tensor]] = {}
        self.nbytes = 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def out(self, held: Held, tensor: Tensor) -> Any:
        buffer = self._buffer(tensor.nbytes)
        held.host = buffer.view(tensor.dtype).as_strided(tensor.shape, held.strides)
        weakref.finalize(held, self.give_back, buffer).atexit = False
        return self._copy(tensor, held.host)

    def back(self, held: Held, into: Tensor) -> Any:
        assert held.host is not None
        return self._copy(held.host, into)

    def wait(self, event: Any) -> None:
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def give_back(self, buffer: Tensor) -> None:
        """Nobody reads it any more, but for copies that were ordered before the next one."""
        self.free[buffer.nbytes].append(buffer)

    def _buffer(self, nbytes: int) -> Tensor:
        free = self.free.setdefault(nbytes, [])
        if free:
            return free.pop()
        self.nbytes += nbytes
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._stream is not None)

    def _copy(self, source: Tensor, target: Tensor) -> Any:
        """Behind all that was to compute so far, which made the one or has freed the other."""
        if self._stream is None:
            target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()


class Held:
    """What autograd keeps in the place of a tensor.

    Args:
        number: which one of all it is.
        tensor: on the device.
        where: what copies it.

    Attributes:
        tensor: None while it is not on the device.
        host: on the host.
        used: whether it has been asked for.
    """

    def __init__(self, number: int, tensor: Tensor, where: Nowhere) -> None:
        self.number, self.where, self.used = number, where, False
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.strides = torch.empty_like(tensor, device="meta").stride()
        self.version = tensor._version
        self.host: Tensor | None = None
        self.tensor: Tensor | None = tensor
        self.event = where.out(self, tensor)

    def bring(self) -> None:
        """Let it be on its way to the device, where it is not there."""
        if self.tensor is None:
            self.tensor = torch.empty_strided(
                self.shape, self.strides, dtype=self.dtype, device=self.device
            )
            self.event = self.where.back(self, self.tensor)

    def take(self) -> Tensor:
        """It, for whoever asks: there is none here afterwards."""
        tensor = self.tensor
        assert tensor is not None
        self.leave()
        return tensor

    def leave(self) -> None:
        """Let go of what is on the device, behind its copy."""
        self.where.wait(self.event)
        self.tensor = self.event = None

    def is_of(self, tensor: Tensor) -> bool:
        """Whether this tensor, which is on the device, is the one that is held."""
        mine = self.tensor
        return (
            mine is not None
            and mine.untyped_storage()._cdata == tensor.untyped_storage()._cdata
            and mine.storage_offset() == tensor.storage_offset()
            and (mine.shape, mine.stride(), mine.dtype)
            == (tensor.shape, tensor.stride(), tensor.dtype)
            and self.version == tensor._version
        )

    def __del__(self) -> None:
        """Whoever is given that memory next computes behind the copy into it."""
        if self.tensor is not None:
            self.where.wait(self.event)


class Offload(saved_tensors_hooks):
    """While it is entered, what autograd keeps waits on the host. Entered anew for each step.

    Args:
        model: whose parameters and buffers stay where they are.
        where: what copies.

    Attributes:
        moved: tensors that went, so far.
        late: of these, the ones that were not on their way back before they were asked for.
    """

    def __init__(self, model: nn.Module, where: Nowhere) -> None:
        super().__init__(self._pack, self._unpack)
        self.model, self.where = model, where
        self.moved = self.late = 0
        self._held: weakref.WeakValueDictionary[int, Held] = weakref.WeakValueDictionary()
        self._leaving: Held | None = None
        self._fixed: set[int] = set()

    def __enter__(self) -> None:
        tensors = (*self.model.parameters(), *self.model.buffers())
        self._fixed = {tensor.untyped_storage()._cdata for tensor in tensors}
        super().__enter__()

    def __exit__(self, *args: Any) -> None:
        self._leave()
        super().__exit__(*args)

    def _pack(self, tensor: Tensor) -> Any:
        tensor = tensor.detach()
        if not self._moves(tensor):
            return tensor
        if self._leaving is not None and self._leaving.is_of(tensor):
            return self._leaving
        self._leave()
        held = self._leaving = self._held[self.moved] = Held(self.moved, tensor, self.where)
        self.moved += 1
        return held

    def _unpack(self, held: Any) -> Tensor:
        if isinstance(held, Tensor):
            return held
        if held is self._leaving:
            self._leaving = None
        else:
            self._leave()
        if held.tensor is None:
            held.bring()
            self.late += 1
        tensor, held.used = held.take(), True
        before = self._held.get(held.number - 1)
        if before is not None and not before.used:
            before.bring()
        return tensor

    def _leave(self) -> None:
        """What was kept last has had its time."""
        if self._leaving is not None:
            self._leaving.leave()
        self._leaving = None

    def _moves(self, tensor: Tensor) -> bool:
        """Whether a tensor is worth the way, and takes memory of its own."""
        storage = tensor.untyped_storage()
        there = not isinstance(self.where, Host) or tensor.device.type == self.where.device.type
        own = storage._cdata not in self._fixed and storage.nbytes() >= tensor.nbytes
        return there and own and tensor.nbytes >= LEAST
