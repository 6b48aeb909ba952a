"""Weights that live in the host's memory, and are on the device while they compute.

A model's blocks compute one after the other, and their frozen weights are only read. So the
weights of a block lie in one buffer of the host, and the device has two buffers of the size of the
largest: one block computes, and the next in the order of the pass is copied meanwhile.

Nothing has to announce a block. Whoever reads the rows of a weight (a product, a selection, a
merge) says so by reading them, and gets that block first; which one comes after it is what came
after it last time. A guess that was wrong costs a copy, and is right the next time.

What is learned in a block can come and go with it, in buffers of its own, which are written back.
`leanlift.streaming.offload` does the like with what autograd keeps for the backward pass.
"""

from leanlift.streaming.block import Block, Place, nbytes_of
from leanlift.streaming.pool import BUFFERS, Pool
from leanlift.streaming.tiles import Streamed, streamed
from leanlift.streaming.written import BlockState, StatePool

STREAMED = "_streamed_in"
"""The attribute of a Parameter that is streamed: its pool, and the number of its block."""

__all__ = [
    "BUFFERS",
    "STREAMED",
    "Block",
    "BlockState",
    "Place",
    "Pool",
    "StatePool",
    "Streamed",
    "nbytes_of",
    "streamed",
]
