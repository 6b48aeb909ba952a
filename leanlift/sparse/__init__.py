"""The compact COO store: where the trained entries are, and what happens when they change."""

from leanlift.sparse.index import SEGMENT, SegmentedIndex, anchors_of, index_nbytes
from leanlift.sparse.update import MaskChange, change_mask

__all__ = [
    "SEGMENT",
    "MaskChange",
    "SegmentedIndex",
    "anchors_of",
    "change_mask",
    "index_nbytes",
]
