"""How many rows of the values' gradient are formed at once.

On CUDA a product of rows is written, and then the entries that are trained are gathered from it. So
many rows are formed at once that their product is still in the second-level cache when it is read,
and with it what the next one writes over, if three things hold: as many rows exist, their product
keeps all multiprocessors busy, and it takes the device longer than it takes the host to launch it.
Else all rows are: the scratch has room for any layer's weight, and one product is one launch.

On a CPU of most masks the entries alone are formed, of many rows at once.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from leanlift.tiles import tile_rows

SAMPLED_TILE_BYTES = 64 * 2**20
"""Of fp32 rows whose selected entries are formed at once on a CPU."""

TILE = 128
"""Rows, and columns, that a product's kernel forms in one multiprocessor, as a rule."""

WAVES = 4
"""Tiles that each multiprocessor has to have: with w of them a last, partly filled round takes at
most one part in w longer."""

FLOP = 60e9
"""Of a product that is worth a launch of its own: an estimate, not timed. It is a tenth of a
millisecond at 600 TFLOP/s, about what Python takes to launch a product and a gather."""


def gradient_rows(m: int, n: int, x: Tensor) -> int:
    """Rows of the values' gradient that are formed at once.

    Args:
        m, n: of the weight.
        x: [T, n], on its device, in the dtype in which the product is formed.
    """
    if x.device.type != "cuda":
        return tile_rows(n, 4, SAMPLED_TILE_BYTES)
    rows = cached_rows(m, n, x.element_size(), *cache_of(x.device))
    return rows if 2 * x.shape[0] * rows * n >= FLOP else m


def cached_rows(m: int, n: int, itemsize: int, cache: int, processors: int) -> int:
    """Of an [m, n] product: equal pieces that take at most half of the cache, in whole tiles; m
    where such a piece has fewer than `WAVES` tiles for each multiprocessor.

    Args:
        m, n, itemsize: of the product.
        cache: bytes of the second-level cache; 0 where that is not known.
        processors: multiprocessors.
    """
    fitting = cache // 2 // (n * itemsize) // TILE * TILE
    if fitting >= m or fitting // TILE * -(-n // TILE) < WAVES * processors:
        return m
    equal = -(-m // -(-m // fitting))
    return -(-equal // TILE) * TILE


@functools.cache
def cache_of(device: torch.device) -> tuple[int, int]:
    """Bytes of a GPU's second-level cache, and its multiprocessors; 0 and 1 where its driver does
    not say so, which `cached_rows` takes for a reason to form all rows at once."""
    found = torch.cuda.get_device_properties(device)
    return getattr(found, "L2_cache_size", 0), getattr(found, "multi_processor_count", 1)
