"""Two slots on the device, and which block is in which.

On CUDA the copies have a stream of their own. A copy into a slot waits until what was enqueued so
far has computed, for that may still read what the slot held; whoever computes with a slot waits for
its copy. Both waits are the device's, the host goes on. On a CPU the same slots are filled with
plain copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leanlift.streaming.block import Block

SLOTS = 2


@dataclass
class Slot:
    """A buffer of the device.

    Attributes:
        buffer: bytes for the largest block.
        holds: the block in it; None: none yet.
        ready: an event behind its copy; None: it is there.
    """

    buffer: Tensor
    holds: int | None = None
    ready: Any = None


class Pool:
    """Brings blocks to a device when they are read.

    Args:
        blocks: of a model, in the order in which they compute.
        device: where they are read.

    Attributes:
        copies: blocks that were copied, so far.
        waited: of these, the ones that were not on their way before they were asked for.
    """

    def __init__(self, blocks: Sequence[Block], device: torch.device) -> None:
        self.blocks, self.device = list(blocks), device
        largest = max((block.nbytes for block in self.blocks), default=0)
        self.slots = [
            Slot(torch.empty(largest, dtype=torch.uint8, device=device)) for _ in range(SLOTS)
        ]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._current: int | None = None
        self._turn: tuple[int | None, int] | None = None
        self._after: dict[tuple[int | None, int], int] = {}
        self.copies = self.waited = 0

    @property
    def nbytes(self) -> int:
        """Of the slots."""
        return sum(slot.buffer.nbytes for slot in self.slots)

    @property
    def host_nbytes(self) -> int:
        """Of the blocks, in the host's memory."""
        return sum(block.nbytes for block in self.blocks)

    def need(self, number: int) -> None:
        """Let a block's tensors be read from the device, and the next one's be on their way."""
        if number == self._current:
            return
        slot = next((slot for slot in self.slots if slot.holds == number), None)
        if slot is None:
            slot = self._free()
            self._copy(number, slot)
            self.waited += 1
        if slot.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.ready)
            slot.ready = None
        self.blocks[number].read_from(slot.buffer)
        turn = (self._current, number)
        if self._turn is not None:
            self._after[self._turn] = number
        self._turn, self._current = turn, number
        self._bring(self._next(turn))

    def release(self) -> None:
        """Let every block be read from the host again."""
        for slot in self.slots:
            self._empty(slot)
        self._current = self._turn = None

    def _bring(self, number: int | None) -> None:
        """Copy a block into the slot that does not compute, where it is nowhere yet."""
        if number is not None and all(slot.holds != number for slot in self.slots):
            self._copy(number, self._free())

    def _free(self) -> Slot:
        """The slot that holds what is not computed with."""
        return next(
            slot for slot in self.slots if slot.holds != self._current or slot.holds is None
        )

    def _copy(self, number: int, slot: Slot) -> None:
        self._empty(slot)
        block = self.blocks[number]
        target = slot.buffer[: block.nbytes]
        if self._stream is None:
            target.copy_(block.host)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                target.copy_(block.host, non_blocking=True)
            slot.ready = self._stream.record_event()
        slot.holds = number
        self.copies += 1

    def _empty(self, slot: Slot) -> None:
        """Let what a slot held be read from the host."""
        if slot.holds is not None:
            held = self.blocks[slot.holds]
            held.read_from(held.host)
        slot.holds = slot.ready = None

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
