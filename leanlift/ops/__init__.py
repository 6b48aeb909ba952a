"""Raw tensor operations behind one name each. The torch reference is the specification; Triton
kernels, where they pay, are imported only where they are chosen."""

from leanlift.ops.choice import IMPLEMENTATIONS, adamw_kernel, resolve, tile_ops
from leanlift.ops.parts import (
    EightBit,
    FourBit,
    IndexPart,
    MomentParts,
    Offsets,
    Scales,
    Source,
    TileOps,
)
from leanlift.ops.reference import add_offsets_, decode, gather_entries, patch_rows_

__all__ = [
    "IMPLEMENTATIONS",
    "EightBit",
    "FourBit",
    "IndexPart",
    "MomentParts",
    "Offsets",
    "Scales",
    "Source",
    "TileOps",
    "adamw_kernel",
    "add_offsets_",
    "decode",
    "gather_entries",
    "patch_rows_",
    "resolve",
    "tile_ops",
]
