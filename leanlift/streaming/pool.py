"""Two buffers on the device, and which block is in which.

On CUDA the copies have a stream of their own. A copy into a buffer waits until what was enqueued so
far has computed, for that may still read what the buffer held; whoever computes with a buffer waits
for its copy. Both waits are the device's, the host goes on. On a CPU the same buffers are filled
with plain copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leanlift.streaming.block import Block

BUFFERS = 2


@dataclass
class Buffer:
    """A buffer of the device.

    Attributes:
        memory: bytes for the largest block.
        holds: the block in it; None: none yet.
        ready: an event behind its copy; None: it is there.
    """

    memory: Tensor
    holds: int | None = None
    ready: Any = None


class Pool:
    """Brings blocks to a device when they are read.

    Args:
        blocks: of a model, in the order in which they compute.
        device: where they are read.
        with_state: whether what is learned in a block comes with it, in a pool of its own.

    Attributes:
        copies: blocks that were copied, so far.
        waited: of these, the ones that were not on their way before they were asked for.
    """

    def __init__(
        self, blocks: Sequence[Block], device: torch.device, with_state: bool = False
    ) -> None:
        self.blocks, self.device, self.with_state = list(blocks), device, with_state
        largest = max((block.nbytes for block in self.blocks), default=0)
        self.buffers = [
            Buffer(torch.empty(largest, dtype=torch.uint8, device=device)) for _ in range(BUFFERS)
        ]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._current: int | None = None
        self._turn: tuple[int | None, int] | None = None
        self._after: dict[tuple[int | None, int], int] = {}
        self.copies = self.waited = 0

    @property
    def nbytes(self) -> int:
        """Of the buffers."""
        return sum(buffer.memory.nbytes for buffer in self.buffers)

    @property
    def host_nbytes(self) -> int:
        """Of the blocks, in the host's memory."""
        return sum(block.nbytes for block in self.blocks)

    def need(self, number: int) -> None:
        """Let a block's tensors be read from the device, and the next one's be on their way."""
        if number == self._current:
            return
        buffer = next((buffer for buffer in self.buffers if buffer.holds == number), None)
        if buffer is None:
            buffer = self._free()
            self._copy(number, buffer)
            self.waited += 1
        if buffer.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(buffer.ready)
            buffer.ready = None
        self.blocks[number].read_from(buffer.memory)
        turn = (self._current, number)
        if self._turn is not None:
            self._after[self._turn] = number
        self._turn, self._current = turn, number
        self._bring(self._next(turn))

    def _bring(self, number: int | None) -> None:
        """Copy a block into the buffer that does not compute, where it is nowhere yet."""
        if number is not None and all(buffer.holds != number for buffer in self.buffers):
            self._copy(number, self._free())

    def _free(self) -> Buffer:
        """The buffer that holds what is not computed with."""
        idle = (each for each in self.buffers if each.holds is None or each.holds != self._current)
        return next(idle)

    def _copy(self, number: int, buffer: Buffer) -> None:
        self._empty(buffer)
        self._fill(number, buffer)

    def _fill(self, number: int, buffer: Buffer) -> None:
        """Copy a block into a buffer that holds none."""
        block = self.blocks[number]
        self._transfer(block.host, buffer.memory[: block.nbytes])
        if self._stream is not None:
            buffer.ready = self._stream.record_event()
        buffer.holds = number
        self.copies += 1

    def _transfer(self, source: Tensor, target: Tensor) -> None:
        """Copy between the host and a buffer: behind what was enqueued so far, and beside what will
        be."""
        if self._stream is None:
            target.copy_(source)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def _empty(self, buffer: Buffer) -> None:
        """Let what a buffer held be read from the host."""
        if buffer.holds is not None:
            held = self.blocks[buffer.holds]
            held.read_from(held.host)
        buffer.holds = buffer.ready = None

    def _next(self, turn: tuple[int | None, int]) -> int | None:
        """The block that came after these two the last time; at first the neighbour on the way that
        a pass takes: to the last block and back again."""
        known = self._after.get(turn)
        if known is not None:
            return known
        before, now = turn
        step = -1 if before is not None and now < before else 1
        wanted = now + step if 0 <= now + step < len(self.blocks) else now - step
        return wanted if 0 <= wanted < len(self.blocks) else None
