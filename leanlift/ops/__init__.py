"""Raw tensor operations behind one name each. The torch reference is the specification; Triton
kernels, where they pay, are imported only where they are chosen."""

from leanlift.ops.choice import IMPLEMENTATIONS, adamw_kernel, resolve, tile_ops
from leanlift.ops.parts import (
    EightBit,
    FourBit,
    MomentParts,
    Scales,
    TileOps,
)
from leanlift.ops.reference import gather_entries

__all__ = [
    "IMPLEMENTATIONS",
    "EightBit",
    "FourBit",
    "MomentParts",
    "Scales",
    "TileOps",
    "adamw_kernel",
    "gather_entries",
    "resolve",
    "tile_ops",
]
