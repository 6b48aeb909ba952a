"""Choosing an implementation by name. An explicit choice never falls back.

"auto" is Triton on CUDA where Triton can be imported, else torch. "triton" is Triton or an error.
"triton-strips" is that, with a gradient of the values of which only what the mask needs is formed.
It is not what "auto" means: nobody has timed it on a GPU (`benchmarks/strips_product.py` does).
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from leanlift.errors import UserError
from leanlift.ops.parts import TileOps
from leanlift.ops.reference import TorchOps

IMPLEMENTATIONS = ("auto", "torch", "triton", "triton-strips")


def tile_ops(name: str, device: torch.device) -> TileOps:
    """The implementation that `name` means on `device`.

    Raises:
        UserError: an unknown name, or one of Triton's where it cannot run.
    """
    if resolve(name, device) == "torch":
        return _torch_ops()
    if name == "triton-strips":
        strips: TileOps = importlib.import_module("leanlift.ops.triton_strips").TritonStrips()
        return strips
    ops: TileOps = _kernels().TritonOps()
    return ops


def resolve(name: str, device: torch.device) -> str:
    """ "torch" or "triton", for every name.

    Raises:
        UserError: as `tile_ops`.
    """
    if name not in IMPLEMENTATIONS:
        raise UserError(f"expected ops among {', '.join(IMPLEMENTATIONS)}, got {name!r}.")
    if name == "torch" or (name == "auto" and device.type != "cuda"):
        return "torch"
    kernels = _kernels()
    if name == "auto":
        return "torch" if kernels is None else "triton"
    if kernels is None:
        raise UserError(
            f"ops={name} needs Triton, which cannot be imported: install leanlift[triton], or use "
            "ops=torch."
        )
    if device.type != "cuda" and not kernels.INTERPRETED:
        raise UserError(
            f"ops={name} needs a CUDA device, but the model is on {device.type}: use ops=auto or "
            "ops=torch."
        )
    return "triton"


def adamw_kernel(name: str, device: torch.device) -> Any:
    """The fused step of `SparseAdamW`, or None where `name` means torch.

    Raises:
        UserError: as `tile_ops`.
    """
    if resolve(name, device) == "torch":
        return None
    return importlib.import_module("leanlift.ops.triton_adamw").adamw_step_


@functools.cache
def _torch_ops() -> TorchOps:
    return TorchOps()


@functools.cache
def _kernels() -> Any:
    """The module with the row kernels, or None without Triton."""
    try:
        return importlib.import_module("leanlift.ops.triton_rows")
    except ImportError:
        return None
