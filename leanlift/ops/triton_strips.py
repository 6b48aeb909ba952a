"""Triton kernels for the values' gradient that form what the mask needs, and nothing else of it.

Of grad_y^T x those blocks of 128 rows and 128 columns are formed that `leanlift.sparse.strips`
lists: one program per block. Columns lie in the order of their strips, so a block reads 128
neighbouring columns of x; its rows are anywhere, so grad_y is turned first, and each is read along
the tokens. Both copies are padded with zeros: the loop over tokens has no mask. A block is written
to its rows of a dense [m, N] in whole lines, and a second kernel gathers from there as
`triton_rows.gather_kernel` does, by way of each column's place. No two programs write to one place:
the same numbers give the same gradient, bit for bit.

Entries do not go straight from a block into the gradient. A row's entries in other strips lie
between those of a block, so where each goes would have to be kept: four bytes an entry, of which
the whole index takes 1.1.

Memory: the scratch holds [m, N] + T (m + N), where the dense product needs [m, n].

Shapes: T tokens, m rows, n columns, N those of all strips, G blocks, k entries.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanlift.ops.parts import Take
from leanlift.ops.triton_rows import (
    OUTPUTS,
    WARPS,
    TritonOps,
    _columns_of,
    _counts_of,
    _segments,
)
from leanlift.sparse import GROUP, STRIP, SegmentedIndex

TOKENS = 64
"""Tokens of both factors that are multiplied at once; of fp32 a half: twice the bytes."""
PRODUCT_WARPS, STAGES = 8, 3


@triton.jit
def strips_kernel(
    turned, right, dense, rows, strips, T, N,
    GROUP: tl.constexpr, STRIP: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """dense [m, N] = turned [m, T] @ right [T, N] in the listed rows of each strip; one program per
    group of rows. T is a multiple of TOKENS, N of STRIP."""
    group = tl.program_id(0)
    row = tl.load(rows + group * GROUP + tl.arange(0, GROUP)).to(tl.int64)
    listed = row >= 0
    row = tl.where(listed, row, 0)
    column = tl.load(strips + group) * STRIP + tl.arange(0, STRIP)
    token = tl.arange(0, TOKENS)
    left_at = turned + row[:, None] * T + token[None, :]
    right_at = right + token[:, None] * N + column[None, :]
    sums = tl.zeros((GROUP, STRIP), dtype=tl.float32)
    for _ in range(0, T, TOKENS):
        sums = tl.dot(tl.load(left_at), tl.load(right_at), sums, input_precision="ieee")
        left_at += TOKENS
        right_at += TOKENS * N
    place = dense + row[:, None] * N + column[None, :]
    tl.store(place, sums.to(dense.dtype.element_ty), mask=listed[:, None])


@triton.jit(do_not_specialize=["before"])
def gather_sorted_kernel(
    dense, out, N, ranks, columns, counts, row_ends, before, S,
    SEGMENT: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """out [k] = the entries of dense [m, N], whose columns are sorted; one program per row."""
    row = tl.program_id(0)
    ends = tl.cumsum(_counts_of(counts, row, S, 0, PADDED), 0)
    count = tl.max(ends, 0)
    first = tl.load(row_ends + row) - before - count
    for done in range(0, count, ENTRIES):
        entry = done + tl.arange(0, ENTRIES)
        inside = entry < count
        column = _columns_of(
            columns, first, entry, inside, counts, row, S, ends, SEGMENT, PADDED, CHUNK
        )
        place = tl.load(ranks + column, mask=inside, other=0)
        value = tl.load(dense + row.to(tl.int64) * N + place, mask=inside, other=0.0)
        tl.store(out + first + entry, value.to(out.dtype.element_ty), mask=inside)


class TritonStrips(TritonOps):
    """The kernels of `triton_rows`, but for the gradient; see `TileOps`."""

    name = "triton-strips"
    lists_rows = True

    def sampled_product(
        self, left: Tensor, right: Tensor, index: SegmentedIndex, out: Tensor, take: Take
    ) -> None:
        if not index.count:
            return
        assert left.dtype in OUTPUTS, f"no kernel multiplies {left.dtype}"
        assert out.is_contiguous()
        strips, (m, _) = index.strips, index.shape
        T, N = -(-left.shape[0] // TOKENS) * TOKENS, strips.width
        room = take(1, m * N + T * (m + N), left.dtype, left.device).view(-1)
        dense, turned, sorted_ = room.split([m * N, m * T, T * N])
        _turn(left, turned.view(m, T))
        _sort(right, strips.order, sorted_.view(T, N))
        with torch.cuda.device_of(out):  # Triton launches on the current one
            strips_kernel[(strips.rows.shape[0],)](
                turned, sorted_, dense, strips.rows, strips.strips, T, N,
                **product_constants(left.dtype),
                num_warps=PRODUCT_WARPS, num_stages=STAGES, enable_fp_fusion=True,
            )  # fmt: skip
            gather_sorted_kernel[(m,)](
                dense, out, N, strips.ranks, index.columns, index.counts, index.ends, index.first,
                index.counts.shape[1], **_segments(index), num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip


def product_constants(dtype: torch.dtype) -> dict[str, Any]:
    """What `strips_kernel` is compiled for."""
    return {"GROUP": GROUP, "STRIP": STRIP, "TOKENS": TOKENS * 2 // max(2, dtype.itemsize)}


def _turn(left: Tensor, turned: Tensor) -> None:
    """turned [m, T] = left^T [m, tokens], zero beyond the tokens."""
    tokens = left.shape[0]
    turned[:, :tokens] = left.T
    turned[:, tokens:] = 0


def _sort(right: Tensor, order: Tensor, sorted_: Tensor) -> None:
    """sorted_ [T, N] = the columns `order` of right [tokens, n], zero beyond the tokens."""
    tokens = right.shape[0]
    torch.index_select(right, 1, order, out=sorted_[:tokens])
    sorted_[tokens:] = 0
