"""The compact COO store: where the trained entries are, their offsets, and what happens when they
change."""

from leanlift.sparse.bound import BoundedMask, bounded_mask, retired_nbytes
from leanlift.sparse.index import (
    SEGMENT,
    SegmentedIndex,
    anchors_nbytes,
    encoding_nbytes,
    index_nbytes,
    index_sizes,
)
from leanlift.sparse.offsets import LayerOffsets, Offsets, add_offsets_, common, find_positions
from leanlift.sparse.strips import GROUP, STRIP, Strips, strips_nbytes
from leanlift.sparse.update import MaskChange, change_mask

__all__ = [
    "GROUP",
    "SEGMENT",
    "STRIP",
    "BoundedMask",
    "LayerOffsets",
    "MaskChange",
    "Offsets",
    "SegmentedIndex",
    "Strips",
    "add_offsets_",
    "anchors_nbytes",
    "bounded_mask",
    "change_mask",
    "common",
    "encoding_nbytes",
    "find_positions",
    "index_nbytes",
    "index_sizes",
    "retired_nbytes",
    "strips_nbytes",
]
