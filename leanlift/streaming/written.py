"""Blocks of tensors that are written where they are on the device: what a model learns.

Positions, offsets and moments of a block come with it, and what an update has written there goes
back to the host before the buffer takes another block. Between two passes everything is at rest on
the host: whoever saves or loads something then finds plain tensors in the host's memory.

A refresh of the mask, or an adapter that is loaded, puts other tensors in the place of those that a
block was laid out for. A block is asked for its tensors anew each time, and laid out again where
they are others, with what they hold by then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from leanlift.streaming.block import Block, Place
from leanlift.streaming.pool import Buffer, Pool


@dataclass(frozen=True)
class BlockState:
    """The tensors of a block that are not frozen.

    Attributes:
        read: those that a pass reads.
        written: those that an update writes in place.
        summed: those that every pass adds to; an update writes them too.
    """

    read: list[Tensor]
    written: list[Tensor]
    summed: list[Tensor] = field(default_factory=list)

    @property
    def tensors(self) -> list[Tensor]:
        """All, in the order in which they lie in a buffer."""
        return [*self.read, *self.summed, *self.written]

    def places(self, updated: bool) -> tuple[int, int]:
        """Of these, the first that an update has written, or a pass that was none, and where they
        end."""
        first = len(self.read)
        return first, len(self.tensors) if updated else first + len(self.summed)


class StatePool(Pool):
    """Brings what is learned in blocks to a device, and takes what is written back.

    Args:
        states: the tensors of each block as they are now, in the order in which blocks compute.
        device: where they are read and written.

    Attributes:
        states: as given.
        written_back: blocks that were, so far, or the sums in them.
    """

    def __init__(self, states: Sequence[Callable[[], BlockState]], device: torch.device) -> None:
        self.states = list(states)
        self._known: list[BlockState] = [state() for state in self.states]
        self._changed: dict[int, bool] = {}  # and whether by an update
        self.written_back = 0
        pinned = device.type == "cuda"
        super().__init__([_laid_out(state, pinned) for state in self._known], device)

    def need(self, number: int) -> None:
        """As of `Pool`; of the tensors that a block has now. Those that come to a block while it is
        on the device are made there."""
        if number != self._current:
            self._follow(number)
            super().need(number)

    def wrote(self, number: int, updated: bool = True) -> None:
        """A block's tensors have been written to, while it was on the device: all that an update
        writes, or the sums alone."""
        self._changed[number] = updated or self._changed.get(number, False)

    def rest(self) -> None:
        """Let all that was written be on the host, and everything be read from there; waits for
        that. Blocks are laid out for what they have by now."""
        for buffer in self.buffers:
            self._empty(buffer)
        self._current = self._turn = None
        self._wait()
        for number in range(len(self.blocks)):
            self._follow(number)
        for buffer in self.buffers:
            self._make_room(buffer, max((block.nbytes for block in self.blocks), default=0))

    def _follow(self, number: int) -> None:
        """Lay a block out anew where its tensors are others than it was laid out for."""
        now = self.states[number]()
        before = self._known[number].tensors
        if len(before) == len(now.tensors) and all(map(_is, before, now.tensors)):
            return
        self._wait()  # what was on its way to the host is there
        self._known[number] = now
        self.blocks[number] = _laid_out(now, self.device.type == "cuda")
        self._changed.pop(number, None)
        for buffer in self.buffers:
            if buffer.holds == number:
                buffer.holds = buffer.ready = None
        if self._current == number:
            self._current = None

    def _fill(self, number: int, buffer: Buffer) -> None:
        self._follow(number)
        self._make_room(buffer, self.blocks[number].nbytes)
        super()._fill(number, buffer)

    def _empty(self, buffer: Buffer) -> None:
        number = buffer.holds
        if number is not None:
            self._follow(number)
        if number is not None and buffer.holds == number and number in self._changed:
            block, updated = self.blocks[number], self._changed.pop(number)
            written = slice(*map(block.start, self._known[number].places(updated)))
            self._transfer(buffer.memory[written], block.host[written])
            self.written_back += 1
        super()._empty(buffer)

    def _make_room(self, buffer: Buffer, nbytes: int) -> None:
        """Let an empty buffer have so many bytes: moments or retired entries have come in."""
        if buffer.memory.nbytes < nbytes:
            self._wait()
            buffer.memory = torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def _wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


def _laid_out(state: BlockState, pinned: bool) -> Block:
    return Block([Place(tensor, "data") for tensor in state.tensors], pinned)


def _is(one: Tensor, other: Tensor) -> bool:
    return one is other
