"""Blocks that come and go: which are copied, in what order, and that nothing stale is read."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from leanlift.streaming import Block, Place, Pool, nbytes_of, streamed
from leanlift.tiles import DenseTiles

CPU = torch.device("cpu")
POISON = 0xAB


class Watched(Pool):
    """Says what is copied, and poisons a buffer the moment that it may be used again."""

    def __init__(self, blocks: list[Block]) -> None:
        self.copied: list[int] = []
        super().__init__(blocks, CPU)

    def _copy(self, number, buffer):
        super()._copy(number, buffer)
        self.copied.append(number)

    def _empty(self, buffer):
        super()._empty(buffer)
        buffer.memory.fill_(POISON)


def blocks(count: int, sizes: tuple[int, ...] = (300, 7)) -> tuple[list[Block], list]:
    """Blocks of tensors whose numbers say which block they are in."""
    holders = [
        [SimpleNamespace(data=torch.full((size,), float(number))) for size in sizes]
        for number in range(count)
    ]
    return [Block([Place(one, "data") for one in of], pin=False) for of in holders], holders


def read(pool: Pool, holders: list, number: int) -> None:
    """What computes with a block sees its numbers, in a buffer."""
    pool.need(number)
    buffers = [(s.memory.data_ptr(), s.memory.data_ptr() + s.memory.nbytes) for s in pool.buffers]
    for holder in holders[number]:
        assert bool((holder.data == float(number)).all())
        assert any(a <= holder.data.data_ptr() < b for a, b in buffers)


def passes(count: int) -> list[int]:
    """A step under checkpointing: forward, then each block recomputed and gone through."""
    return [*range(count), *(i for i in reversed(range(count)) for _ in range(2))]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_step_copies_each_block_as_often_as_it_must(count: int) -> None:
    made, holders = blocks(count)
    pool = Watched(made)
    for step in range(4):
        before, waited = len(pool.copied), pool.waited
        for number in passes(count):
            read(pool, holders, number)
        if step:  # two blocks are there at each turn
            assert len(pool.copied) - before == 2 * max(0, count - 2)
            assert pool.waited == waited
    assert pool.waited == 1  # the very first
    assert pool.copies == len(pool.copied)


def test_the_next_block_is_on_its_way_while_one_computes() -> None:
    made, holders = blocks(5)
    pool = Watched(made)
    for number in [0, 1, 2, 3, 4]:
        read(pool, holders, number)
        follows = number + 1 if number < 4 else 3
        assert {buffer.holds for buffer in pool.buffers} == {number, follows}
    for number in [4, 3, 2, 1]:
        read(pool, holders, number)
        assert {buffer.holds for buffer in pool.buffers} == {number, number - 1}
    read(pool, holders, 0)
    assert {buffer.holds for buffer in pool.buffers} == {0, 1}


def test_any_order_is_right_and_learned() -> None:
    """Forward passes alone, as when text is generated; blocks that are passed over; and back."""
    made, holders = blocks(6)
    pool = Watched(made)
    for order in ([0, 1, 2, 3, 4, 5], [0, 2, 4], [5, 1, 5, 1], [3]):
        for _ in range(3):
            waited = pool.waited
            for number in order:
                read(pool, holders, number)
        assert pool.waited == waited, order


def test_what_no_slot_holds_is_read_from_the_host() -> None:
    made, holders = blocks(4)
    hosts = [[holder.data.data_ptr() for holder in of] for of in holders]
    pool = Watched(made)
    for number in passes(4):
        read(pool, holders, number)
        for other, (of, host) in enumerate(zip(holders, hosts, strict=True)):
            assert all(bool((holder.data == float(other)).all()) for holder in of)
            if other != number and all(buffer.holds != other for buffer in pool.buffers):
                assert [holder.data.data_ptr() for holder in of] == host


def test_a_block_takes_one_buffer_and_a_slot_that_of_the_largest() -> None:
    small, _ = blocks(1, (10,))
    large, _ = blocks(2, (300, 7))
    assert small[0].nbytes == nbytes_of([40]) == 256
    assert large[0].nbytes == nbytes_of([1200, 28]) == 1280 + 256
    pool = Pool([*small, *large], CPU)
    assert pool.nbytes == 2 * large[0].nbytes
    assert pool.host_nbytes == 256 + 2 * large[0].nbytes


def test_the_rows_of_a_weight_bring_its_block() -> None:
    holders = [SimpleNamespace(data=torch.full((4, 3), float(n))) for n in range(3)]
    pool = Watched([Block([Place(one, "data")], pin=False) for one in holders])

    class Tiles(DenseTiles):
        def __init__(self, holder):
            self.__dict__["holder"] = holder

        tensor = property(lambda self: self.holder.data)

    weights = [streamed(Tiles(one), pool, n) for n, one in enumerate(holders)]
    for number in (2, 0, 1, 2):
        rows = weights[number].rows(1, 3)
        assert torch.equal(rows, torch.full((2, 3), float(number)))
        assert weights[number].shape == (4, 3)
        assert weights[number].device == CPU
    assert not hasattr(weights[0], "stored")
    assert not hasattr(weights[0], "parts")
