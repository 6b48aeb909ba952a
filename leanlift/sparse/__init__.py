"""The compact COO store: where the trained entries are, and what happens when they change."""

from leanlift.sparse.index import SEGMENT, SegmentedIndex, index_nbytes
from leanlift.sparse.patch import add_offsets_
from leanlift.sparse.update import MaskChange, change_mask

__all__ = [
    "SEGMENT",
    "MaskChange",
    "SegmentedIndex",
    "add_offsets_",
    "change_mask",
    "index_nbytes",
]
