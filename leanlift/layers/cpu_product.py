"""Products with a weight on a CPU: by tiles of its rows, which are made and used while a cache has
them.

A large weight that is made whole is written to memory, in pages that the system clears first, is
read for its offsets and written again, and read by the product; and it is there. Tiles of a few
megabytes need no room for it, in about the same time (`benchmarks/cpu_product`).

A CPU without AVX-512's or AMX's products in 16 bits multiplies by loops, three times as slow as an
fp32 product forward and a hundred times backward. There a tile is widened, and the product is one
in fp32.

Sums over tiles are in fp32, and are rounded once: so many tokens go at once that they stay small
beside a large weight.

Shapes: T tokens, W [m, n].
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from leanlift.tiles import few_of, row_ranges, tile_rows

TILE_BYTES = 8 * 2**20
"""Of fp32 rows that are multiplied with at once: worth many times Python's time for a tile, and a
fraction of a large weight."""

TOKENS = 4096
"""That go over all tiles at once: making a weight anew takes little beside a product of so many."""

FEW = 4
"""Tokens, at most, that are not worth widening a tile for: torch's forward loop in 16 bits goes
along the rows, and reads half the bytes. A token that is generated is alone."""

Rows = Callable[[int, int], Tensor]
"""Rows start:stop of W, in the dtype of the computation; valid until the next ones are made."""


def times_turned(x: Tensor, rows: Rows, y: Tensor, bias: Tensor | None = None) -> None:
    """Write x W^T + bias to y.

    Args:
        x: [..., n].
        rows: of W.
        y: [..., m], in rows and of the dtype of x.
        bias: [m], in that dtype.
    """
    flat, out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    wide = _wide if flat.shape[0] > FEW else _as_it_is
    bias = None if bias is None else wide(bias)
    for first, last in few_of(row_ranges(flat.shape[0], TOKENS), x):
        tokens = wide(flat[first:last])
        for start, stop in tiles(out.shape[1], flat.shape[1], x):
            turned, into = wide(rows(start, stop)).T, out[first:last, start:stop]
            if bias is not None:
                into.copy_(torch.addmm(bias[start:stop], tokens, turned))
            elif x.dtype.itemsize > 2:
                torch.mm(tokens, turned, out=into)
            else:  # rounded, or by oneDNN, which makes rows of its own anyway
                into.copy_(tokens @ turned)
            del turned  # before the next tile is made


def times(grad_y: Tensor, rows: Rows, product: Tensor, adds: bool = False) -> None:
    """Write grad_y W to `product`, or add it to what is there.

    Args:
        grad_y: [..., m].
        rows: of W.
        product: [..., n], in rows and of the dtype of grad_y, or of the wider one of its sums.
        adds: whether it is added; in the dtype of the sums alone.
    """
    flat, out = grad_y.reshape(-1, grad_y.shape[-1]), product.view(-1, product.shape[-1])
    for first, last in few_of(row_ranges(flat.shape[0], TOKENS), grad_y):
        into = out[first:last]
        wide = torch.promote_types(into.dtype, torch.float32)
        sums = into if into.dtype == wide else torch.empty_like(into, dtype=wide)
        for start, stop in tiles(flat.shape[1], out.shape[1], grad_y):
            left, right = _wide(flat[first:last, start:stop]), _wide(rows(start, stop))
            if left.dtype == sums.dtype:
                torch.addmm(sums, left, right, beta=float(adds or start > 0), out=sums)
            elif adds or start:
                sums.add_(left @ right)
            else:
                sums.copy_(left @ right)
            del left, right  # before the next tile is made
        if sums is not into:
            into.copy_(sums)
        del sums  # before the next ones are made


def part_of(weight: Tensor) -> Rows:
    """Rows of a weight that is there."""
    return lambda start, stop: weight[start:stop]


def tiles(m: int, n: int, x: Tensor) -> list[tuple[int, int]]:
    """The ranges of rows of W [m, n] that are multiplied with at once; of a plan's x some, which
    take what all of them take."""
    return few_of(row_ranges(m, rows_at_once(n)), x)


def rows_at_once(n: int) -> int:
    """How many rows of n entries are multiplied with at once, at most."""
    return tile_rows(n, 4, TILE_BYTES)


def _wide(factor: Tensor) -> Tensor:
    """In the dtype in which this machine multiplies."""
    return factor if has_products(factor.dtype) else factor.float()


def _as_it_is(factor: Tensor) -> Tensor:
    return factor


@functools.cache
def has_products(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU multiplies matrices in a dtype, by oneDNN or by BLAS."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True
