"""Triton kernels for a layer's rows: dequantize and patch in one pass, and gather.

One program owns one row. It writes the dequantized row with wide stores and then, behind a
barrier, writes the patched entries over it: their base is dequantized once more at each entry, so
nothing is read back and a sum is rounded once. Patching costs 5 % of the row in scattered stores,
to lines that are in the cache still. Positions come straight from the compact index: the segment
of an entry is the number of segments that end at or before it.

torch's way writes the matrix, reads it, gathers and scatters through int64 positions: ten times
the bytes. Products and sums are not contracted: fp32 results equal the reference's bit for bit.

Shapes: r rows, n columns, S segments a row, k entries.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanlift.ops.parts import EightBit, FourBit, Take
from leanlift.ops.reference import dense_product
from leanlift.sparse import SEGMENT, Offsets, SegmentedIndex
from leanlift.tiles import RowTiles

INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, on a CPU."""

DENSE, INT8, FOUR, NESTED = (tl.constexpr(kind) for kind in range(4))
WARPS = 4
CHUNK = 64
"""Ends of segments that a thread holds: more would not leave it registers enough."""
OUTPUTS = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _scale_of(
    block, inside, absmax, outer, table256, offset, OUTER: tl.constexpr, KIND: tl.constexpr
):
    """fp32 scale of each block of a 4-bit weight."""
    if KIND == NESTED:
        code = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        whole = tl.load(outer + block // OUTER, mask=inside, other=0.0)
        scale = tl.load(table256 + code) * whole + tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    return scale


@triton.jit
def _base_at(
    row, column, inside, n, codes, absmax, table, outer, table256, offset,
    BLOCK: tl.constexpr, OUTER: tl.constexpr, WEIGHT: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """D(Q) at (row, column), fp32, after rounding to the weight's dtype."""
    place = row.to(tl.int64) * n + column
    if KIND == DENSE:
        value = tl.load(codes + place, mask=inside, other=0.0).to(tl.float32)
    elif KIND == INT8:
        code = tl.load(codes + place, mask=inside, other=0).to(tl.float32)
        value = code * tl.load(absmax + row) * 7.874015718698502e-3
    else:
        byte = tl.load(codes + place // 2, mask=inside, other=0).to(tl.int32)
        code = tl.where(place % 2 == 0, byte >> 4, byte & 15)
        scale = _scale_of(place // BLOCK, inside, absmax, outer, table256, offset, OUTER, KIND)
        value = (tl.load(table + code) * scale).to(WEIGHT).to(tl.float32)
    return value


@triton.jit
def _counts_of(counts, row, S, first, PADDED: tl.constexpr):
    """Entries of PADDED segments of a row, from segment `first` on: int32, 0 beyond the row."""
    segment = first + tl.arange(0, PADDED)
    return tl.load(counts + row * S + segment, mask=segment < S, other=0).to(tl.int32)


@triton.jit
def _segments_before(entry, ends):
    """How many of the segments that end at `ends` end at or before each entry. Segments lie along
    the first axis: a thread then counts those of its own entry, and asks no other."""
    return tl.sum((ends[:, None] <= entry[None, :]).to(tl.int32), axis=0)


@triton.jit
def _columns_of(
    columns, first, entry, inside, counts, row, S, ends,
    SEGMENT: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Column of each entry of a row; `entry` is counted from the row's first one, and so are the
    `ends` of its segments, where there are few enough of them for a thread to hold."""
    if PADDED <= CHUNK:
        segment = _segments_before(entry, ends)
    else:
        segment = tl.zeros_like(entry)
        before = 0
        for chunk in range(0, S, CHUNK):
            some = before + tl.cumsum(_counts_of(counts, row, S, chunk, CHUNK), 0)
            segment += _segments_before(entry, some)
            before = tl.max(some, 0)
    return segment * SEGMENT + tl.load(columns + first + entry, mask=inside, other=0).to(tl.int32)


@triton.jit
def _patch(
    out, row, local, n, columns, counts, row_ends, values, before, scale, S,
    codes, absmax, table, outer, table256, offset,
    BLOCK: tl.constexpr, OUTER: tl.constexpr, WEIGHT: tl.constexpr, KIND: tl.constexpr,
    SEGMENT: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Write base + offset of every entry of one row; `before`: entries before the tile."""
    ends = tl.cumsum(_counts_of(counts, local, S, 0, PADDED), 0)
    count = tl.max(ends, 0)
    first = tl.load(row_ends + local) - before - count
    for done in range(0, count, ENTRIES):
        entry = done + tl.arange(0, ENTRIES)
        inside = entry < count
        column = _columns_of(
            columns, first, entry, inside, counts, local, S, ends, SEGMENT, PADDED, CHUNK
        )
        base = _base_at(
            row, column, inside, n, codes, absmax, table, outer, table256, offset,
            BLOCK, OUTER, WEIGHT, KIND,
        )  # fmt: skip
        value = tl.load(values + first + entry, mask=inside, other=0.0).to(tl.float32) * scale
        place = local.to(tl.int64) * n + column
        tl.store(out + place, (base + value).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _four_bit_row(
    target, row, n, codes, absmax, table, outer, table256, offset,
    BLOCK: tl.constexpr, OUTER: tl.constexpr, WEIGHT: tl.constexpr, KIND: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """target [n] = a row of a 4-bit weight, BLOCKS blocks at a time."""
    begin = row.to(tl.int64) * n
    if ALIGNED:
        first = row.to(tl.int64) * (n // BLOCK)
        above = 0  # columns of the first block that belong to the row above
    else:
        first = begin // BLOCK
        above = (begin % BLOCK).to(tl.int32)
    pair = tl.arange(0, BLOCK // 2)
    within = tl.arange(0, BLOCK)
    for done in range(0, tl.cdiv(n + above, BLOCK), BLOCKS):
        block = done + tl.arange(0, BLOCKS)
        left = block * BLOCK - above
        inside = left < n
        scale_ = _scale_of(first + block, inside, absmax, outer, table256, offset, OUTER, KIND)
        low = left[:, None] + 2 * pair[None, :]  # the column of each byte's first code
        column = left[:, None] + within[None, :]
        if ALIGNED:  # one mask for a block: whole blocks are read and written at once
            read = tl.broadcast_to(inside[:, None], low.shape)
            written = tl.broadcast_to(inside[:, None], column.shape)
        else:
            read = (low < n) & (low + 1 >= 0)
            written = (column >= 0) & (column < n)
        byte = tl.load(
            codes + (first + block)[:, None] * (BLOCK // 2) + pair[None, :], mask=read, other=0
        ).to(tl.int32)
        value = tl.interleave(tl.load(table + (byte >> 4)), tl.load(table + (byte & 15)))
        value = (value * scale_[:, None]).to(WEIGHT).to(tl.float32)
        tl.store(target + column, value.to(target.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=["start", "before", "before2"])
def effective_rows_kernel(
    out, start, n, codes, absmax, table, outer, table256, offset,
    columns, counts, ends, values, before, scale,
    columns2, counts2, ends2, values2, before2, scale2, S,
    BLOCK: tl.constexpr, OUTER: tl.constexpr, WEIGHT: tl.constexpr, KIND: tl.constexpr,
    ALIGNED: tl.constexpr, STORES: tl.constexpr, SEGMENT: tl.constexpr, PADDED: tl.constexpr,
    CHUNK: tl.constexpr, ENTRIES: tl.constexpr, BLOCKS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out [r, n] = D(Q)[start + r] + up to two stores of offsets; one program per row.

    BLOCK entries per scale, OUTER scales per outer scale; ALIGNED: rows begin at a block; a step
    covers BLOCKS blocks of a 4-bit weight, WIDE entries of any other.
    """
    local = tl.program_id(0)
    row = start + local
    target = out + local.to(tl.int64) * n
    if KIND >= FOUR:
        _four_bit_row(
            target, row, n, codes, absmax, table, outer, table256, offset,
            BLOCK, OUTER, WEIGHT, KIND, ALIGNED, BLOCKS,
        )  # fmt: skip
    else:
        for done in range(0, n, WIDE):
            column = done + tl.arange(0, WIDE)
            inside = column < n
            value = _base_at(
                row, column, inside, n, codes, absmax, table, outer, table256, offset,
                BLOCK, OUTER, WEIGHT, KIND,
            )  # fmt: skip
            tl.store(target + column, value.to(out.dtype.element_ty), mask=inside)
    if STORES > 0:
        tl.debug_barrier()  # the row is whole before other threads write over its entries
        _patch(
            out, row, local, n, columns, counts, ends, values, before, scale, S,
            codes, absmax, table, outer, table256, offset,
            BLOCK, OUTER, WEIGHT, KIND, SEGMENT, PADDED, CHUNK, ENTRIES,
        )  # fmt: skip
    if STORES > 1:  # at other positions: no barrier
        _patch(
            out, row, local, n, columns2, counts2, ends2, values2, before2, scale2, S,
            codes, absmax, table, outer, table256, offset,
            BLOCK, OUTER, WEIGHT, KIND, SEGMENT, PADDED, CHUNK, ENTRIES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["before"])
def gather_kernel(
    dense, out, n, columns, counts, row_ends, before, S,
    SEGMENT: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """out [k] = the entries of dense [r, n]; one program per row."""
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
        value = tl.load(dense + row.to(tl.int64) * n + column, mask=inside, other=0.0)
        tl.store(out + first + entry, value.to(out.dtype.element_ty), mask=inside)


class TritonOps:
    """The kernels as an implementation; see `TileOps`."""

    name = "triton"
    whole = True
    lists_rows = False

    def effective_rows(
        self, weight: RowTiles, offsets: Sequence[Offsets], start: int, stop: int, out: Tensor
    ) -> None:
        assert out.dtype in OUTPUTS, f"no kernel writes {out.dtype} rows"
        assert out.is_contiguous()
        assert len(offsets) <= 2
        rows, n = out.shape
        read = getattr(weight, "stored", None)
        if read is not None:
            tensors, constants = _form(read(), weight.dtype, n)
        else:  # dense: rows are views
            tensors, constants = _form(weight.rows(start, stop), weight.dtype, n)
            start = 0
        stores = [store for store in offsets if store.count]
        held = [_store_arguments(store) for store in stores] + [NO_STORE] * 2
        index = stores[0].index if stores else None
        with torch.cuda.device_of(out):  # Triton launches on the current one
            effective_rows_kernel[(rows,)](
                out, start, n, *tensors, *held[0], *held[1],
                index.counts.shape[1] if index is not None else 1,
                **constants, **_segments(index), STORES=len(stores),
                num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip

    def gather(self, dense: Tensor, index: SegmentedIndex, out: Tensor) -> None:
        rows, n = dense.shape
        assert dense.is_contiguous()
        assert out.is_contiguous()
        with torch.cuda.device_of(out):
            gather_kernel[(rows,)](
                dense, out, n, index.columns, index.counts, index.ends, index.first,
                index.counts.shape[1], **_segments(index), num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip

    def sampled_product(
        self, left: Tensor, right: Tensor, index: SegmentedIndex, out: Tensor, take: Take
    ) -> None:
        dense_product(self.gather, left, right, index, out, take)


Constants = dict[str, Any]
"""What a kernel is compiled for."""


def _form(
    stored: FourBit | EightBit | Tensor, dtype: torch.dtype, n: int
) -> tuple[tuple[Tensor | None, ...], Constants]:
    """How a kernel is to read a stored weight: six tensors, and constants."""
    if isinstance(stored, FourBit):
        nested = stored.nested
        held = (stored.packed, stored.absmax, stored.table)
        if nested is None:
            return (*held, None, None, None), _four_bit(stored.blocksize, 1, dtype, n, FOUR)
        constants = _four_bit(stored.blocksize, nested.blocksize, dtype, n, NESTED)
        return (*held, nested.absmax, nested.table, nested.offset), constants
    if isinstance(stored, EightBit):
        return (stored.codes, stored.scales, *(None,) * 4), _plain(dtype, INT8)
    assert stored.is_contiguous()
    return (stored, *(None,) * 5), _plain(dtype, DENSE)


@functools.cache
def _four_bit(block: int, outer: int, dtype: torch.dtype, n: int, kind: Any) -> Constants:
    return {
        "BLOCK": block,
        "OUTER": outer,
        "WEIGHT": _dtype(dtype),
        "KIND": kind.value,
        "ALIGNED": n % block == 0,
        "BLOCKS": max(1, 2048 // block),
        "WIDE": 1,
    }


@functools.cache
def _plain(dtype: torch.dtype, kind: Any) -> Constants:
    constants = {"BLOCK": 2, "OUTER": 1, "ALIGNED": False, "BLOCKS": 1, "WIDE": 1024}
    return {**constants, "WEIGHT": _dtype(dtype), "KIND": kind.value}


def _dtype(dtype: torch.dtype) -> Any:
    return getattr(tl, str(dtype).removeprefix("torch."))


NO_STORE = (None, None, None, None, 0, 1.0)


def _store_arguments(store: Offsets) -> tuple[Tensor, Tensor, Tensor, Tensor, int, float]:
    index = store.index
    return index.columns, index.counts, index.ends, store.values, index.first, float(store.scale)


def _segments(index: SegmentedIndex | None) -> Constants:
    """Constants of an index: segments are padded to a power of two, a step takes an entry per
    thread."""
    if index is None:
        return _NO_SEGMENTS
    return _padded(SEGMENT, index.counts.shape[1])


_NO_SEGMENTS: Constants = {"SEGMENT": 1, "PADDED": 1, "CHUNK": 1, "ENTRIES": 32 * WARPS}


@functools.cache
def _padded(segment: int, segments: int) -> Constants:
    padded = triton.next_power_of_2(segments)
    return {"SEGMENT": segment, "PADDED": padded, "CHUNK": CHUNK, "ENTRIES": 32 * WARPS}
