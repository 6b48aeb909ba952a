"""What cuBLAS works in on a card: memory that torch takes from its allocator and never gives back.

Each thread that multiplies has a workspace of its own for each stream: the one that goes forward,
and autograd's, which goes backward. Its size is torch's to choose (`CublasHandlePool.cpp`): 32 MiB
from compute capability 9.0 on, 8.125 MiB before, or what `CUBLAS_WORKSPACE_CONFIG` says, pairs of a
size in KiB and how many of it, as ":4096:2:16:8". cuBLASLt works in the same.
"""

from __future__ import annotations

import os
import re

import torch

VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
KIB = 1024
LARGE, SMALL = 8 * 4096 * KIB, (2 * 4096 + 8 * 16) * KIB
THREADS = 2
"""That multiply in training: the one that goes forward, and the one that goes backward."""


def workspace_nbytes(capability: tuple[int, int] | None, config: str | None) -> int:
    """Bytes of one thread's.

    Args:
        capability: of the card; None: it is not here, and counts as one of the newer ones.
        config: what the variable says; None, or text without a pair: torch's own choice.
    """
    pairs = re.findall(r":([0-9]+):([0-9]+)", config or "")
    if pairs:
        return sum(int(size) * KIB * int(count) for size, count in pairs)
    return LARGE if capability is None or capability[0] >= 9 else SMALL


def workspace_here() -> int:
    """Bytes of one thread's on this machine's card, or on one that is elsewhere."""
    there = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if there else None
    return workspace_nbytes(capability, os.environ.get(VARIABLE))
