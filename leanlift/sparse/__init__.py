"""The compact COO store: where the trained entries are, and what happens when they change."""

from leanlift.sparse.bound import BoundedMask, bounded_mask, retired_nbytes
from leanlift.sparse.index import SEGMENT, SegmentedIndex, index_nbytes
from leanlift.sparse.patch import add_offsets_, offsets_of
from leanlift.sparse.update import MaskChange, change_mask, find_positions

__all__ = [
    "SEGMENT",
    "BoundedMask",
    "MaskChange",
    "SegmentedIndex",
    "add_offsets_",
    "bounded_mask",
    "change_mask",
    "find_positions",
    "index_nbytes",
    "offsets_of",
    "retired_nbytes",
]
