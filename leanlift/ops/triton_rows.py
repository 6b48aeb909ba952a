"""Triton kernels for a layer's rows: dequantize and patch in one pass, and gather.

One program owns one row. It writes the dequantized row with wide stores and then, behind a
barrier, writes the patched entries over it: their base is dequantized once more at each entry, so
nothing is read back and a sum is rounded once. Patching costs 5 % of the row in scattered stores,
to lines that are in the cache still. Positions come straight from the compact index: the segment
of an entry is the number of segments that end at or before it.

torch's way writes the matrix, reads it, gathers and scatters through int64 positions: an order of
magnitude more bytes.

Products and sums are not contracted, so fp32 results equal the reference's bit for bit.

Shapes: r rows, n columns, S segments a row, k entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanlift.ops.parts import EightBit, FourBit, IndexPart, Offsets, Source, StoredSource, Take
from leanlift.ops.reference import dense_product

INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, on a CPU."""

DENSE, INT8, FOUR, NESTED = (tl.constexpr(kind) for kind in range(4))
WARPS = 4
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
def _ends_of(counts, row, S, PADDED: tl.constexpr):
    """Entries of a row up to and with each segment: int32 [PADDED], the last ones all of them."""
    segment = tl.arange(0, PADDED)
    count = tl.load(counts + row * S + segment, mask=segment < S, other=0).to(tl.int32)
    return tl.cumsum(count, 0)


@triton.jit
def _columns_of(columns, first, entry, inside, ends, SEGMENT: tl.constexpr):
    """Column of each entry of a row; `entry` is counted from the row's first one."""
    segment = tl.sum((ends[None, :] <= entry[:, None]).to(tl.int32), axis=1)
    return segment * SEGMENT + tl.load(columns + first + entry, mask=inside, other=0).to(tl.int32)


@triton.jit
def _patch(
    out, row, local, n, columns, counts, totals, values, scale, S,
    codes, absmax, table, outer, table256, offset,
    BLOCK: tl.constexpr, OUTER: tl.constexpr, WEIGHT: tl.constexpr, KIND: tl.constexpr,
    SEGMENT: tl.constexpr, PADDED: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Write base + offset of every entry of one row."""
    ends = _ends_of(counts, local, S, PADDED)
    count = tl.max(ends, 0)
    first = tl.load(totals + local) - count
    for done in range(0, count, ENTRIES):
        entry = done + tl.arange(0, ENTRIES)
        inside = entry < count
        column = _columns_of(columns, first, entry, inside, ends, SEGMENT)
        base = _base_at(
            row, column, inside, n, codes, absmax, table, outer, table256, offset,
            BLOCK, OUTER, WEIGHT, KIND,
        )  # fmt: skip
        value = tl.load(values + first + entry, mask=inside, other=0.0).to(tl.float32) * scale
        place = local.to(tl.int64) * n + column
        tl.store(out + place, (base + value).to(out.dtype.element_ty), mask=inside)


@triton.jit
def effective_rows_kernel(
    out, start, n, codes, absmax, table, outer, table256, offset,
    columns, counts, totals, values, scale,
    columns2, counts2, totals2, values2, scale2, S,
    BLOCK: tl.constexpr, OUTER: tl.constexpr, WEIGHT: tl.constexpr, KIND: tl.constexpr,
    ALIGNED: tl.constexpr, STORES: tl.constexpr, SEGMENT: tl.constexpr, PADDED: tl.constexpr,
    ENTRIES: tl.constexpr, BLOCKS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out [r, n] = D(Q)[start + r] + up to two stores of offsets; one program per row.

    BLOCK entries per scale, OUTER scales per outer scale; ALIGNED: rows begin at a block; a step
    covers BLOCKS blocks of a 4-bit weight, WIDE entries of any other.
    """
    local = tl.program_id(0)
    row = start + local
    target = out + local.to(tl.int64) * n
    if KIND >= FOUR:
        begin = row.to(tl.int64) * n
        if ALIGNED:
            first = row.to(tl.int64) * (n // BLOCK)
            before = 0  # columns of the first block that belong to the row above
        else:
            first = begin // BLOCK
            before = (begin % BLOCK).to(tl.int32)
        pair = tl.arange(0, BLOCK // 2)
        within = tl.arange(0, BLOCK)
        for done in range(0, tl.cdiv(n + before, BLOCK), BLOCKS):
            block = done + tl.arange(0, BLOCKS)
            left = block * BLOCK - before
            inside = left < n
            scale_ = _scale_of(first + block, inside, absmax, outer, table256, offset, OUTER, KIND)
            low = left[:, None] + 2 * pair[None, :]  # the column of each byte's first code
            byte = tl.load(
                codes + (first + block)[:, None] * (BLOCK // 2) + pair[None, :],
                mask=(low < n) & (low + 1 >= 0), other=0,
            ).to(tl.int32)  # fmt: skip
            value = tl.interleave(tl.load(table + (byte >> 4)), tl.load(table + (byte & 15)))
            value = (value * scale_[:, None]).to(WEIGHT).to(tl.float32)
            column = left[:, None] + within[None, :]
            tl.store(
                target + column, value.to(out.dtype.element_ty), mask=(column >= 0) & (column < n)
            )
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
            out, row, local, n, columns, counts, totals, values, scale, S,
            codes, absmax, table, outer, table256, offset,
            BLOCK, OUTER, WEIGHT, KIND, SEGMENT, PADDED, ENTRIES,
        )  # fmt: skip
    if STORES > 1:  # at other positions: no barrier
        _patch(
            out, row, local, n, columns2, counts2, totals2, values2, scale2, S,
            codes, absmax, table, outer, table256, offset,
            BLOCK, OUTER, WEIGHT, KIND, SEGMENT, PADDED, ENTRIES,
        )  # fmt: skip


@triton.jit
def gather_kernel(
    dense, out, n, columns, counts, totals, S,
    SEGMENT: tl.constexpr, PADDED: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """out [k] = the entries of dense [r, n]; one program per row."""
    row = tl.program_id(0)
    ends = _ends_of(counts, row, S, PADDED)
    count = tl.max(ends, 0)
    first = tl.load(totals + row) - count
    for done in range(0, count, ENTRIES):
        entry = done + tl.arange(0, ENTRIES)
        inside = entry < count
        column = _columns_of(columns, first, entry, inside, ends, SEGMENT)
        value = tl.load(dense + row.to(tl.int64) * n + column, mask=inside, other=0.0)
        tl.store(out + first + entry, value.to(out.dtype.element_ty), mask=inside)


class TritonOps:
    """The kernels as an implementation; see `TileOps`."""

    name = "triton"
    whole = True

    def effective_rows(
        self, weight: Source, offsets: Sequence[Offsets], start: int, stop: int, out: Tensor
    ) -> None:
        assert out.dtype in OUTPUTS, f"no kernel writes {out.dtype} rows"
        assert out.is_contiguous()
        assert len(offsets) <= 2
        rows, n = out.shape
        stored: FourBit | EightBit | Tensor
        if isinstance(weight, StoredSource):
            stored, first = weight.stored(), start
        else:  # dense: rows are views
            stored, first = weight.rows(start, stop), 0
        form = _form(stored, weight.dtype, n)
        stores = [store for store in offsets if store.part.columns.numel()]
        held = [_store_arguments(store) for store in stores] + [(None,) * 4 + (1.0,)] * 2
        segments = stores[0].part.counts.shape[1] if stores else 1
        constants = {**form.constants, **_segments(stores[0].part if stores else None)}
        with torch.cuda.device_of(out):  # Triton launches on the current one
            effective_rows_kernel[(rows,)](
                out, first, n, *form.tensors, *held[0], *held[1], segments,
                **constants, STORES=len(stores), num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip

    def gather(self, dense: Tensor, part: IndexPart, out: Tensor) -> None:
        rows, n = dense.shape
        assert dense.is_contiguous()
        assert out.is_contiguous()
        with torch.cuda.device_of(out):
            gather_kernel[(rows,)](
                dense, out, n, part.columns, part.counts, _totals(part), part.counts.shape[1],
                **_segments(part), num_warps=WARPS,
            )  # fmt: skip

    def sampled_product(
        self, left: Tensor, right: Tensor, part: IndexPart, out: Tensor, take: Take
    ) -> None:
        dense_product(self.gather, left, right, part, out, take)


class _Form:
    """How a kernel is to read a stored weight: its tensors and its constants."""

    def __init__(self, tensors: tuple[Tensor | None, ...], **constants: object) -> None:
        self.tensors = tensors + (None,) * (6 - len(tensors))
        self.constants = {"BLOCK": 2, "OUTER": 1, "ALIGNED": False, "BLOCKS": 1, "WIDE": 1024}
        self.constants.update(constants)  # type: ignore[arg-type]


def _form(stored: FourBit | EightBit | Tensor, dtype: torch.dtype, n: int) -> _Form:
    weight = getattr(tl, str(dtype).removeprefix("torch."))
    if isinstance(stored, FourBit):
        nested, block = stored.nested, stored.blocksize
        tensors = (stored.packed, stored.absmax, stored.table)
        return _Form(
            tensors if nested is None else (*tensors, nested.absmax, nested.table, nested.offset),
            BLOCK=block,
            OUTER=1 if nested is None else nested.blocksize,
            WEIGHT=weight,
            KIND=(FOUR if nested is None else NESTED).value,
            ALIGNED=n % block == 0,
            BLOCKS=max(1, 2048 // block),
        )
    if isinstance(stored, EightBit):
        return _Form((stored.codes, stored.scales), WEIGHT=weight, KIND=INT8.value)
    assert stored.is_contiguous()
    return _Form((stored,), WEIGHT=weight, KIND=DENSE.value)


def _store_arguments(store: Offsets) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    part = store.part
    return part.columns, part.counts, _totals(part), store.values, float(store.scale)


def _totals(part: IndexPart) -> Tensor:
    """Entries up to and with each row: int32 [r], alive for one launch."""
    return part.counts.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32)


def _segments(part: IndexPart | None) -> dict[str, int]:
    """Constants of an index: segments are padded to a power of two, entries are taken in steps
    whose comparison with all segments fits the registers."""
    if part is None:
        return {"SEGMENT": 1, "PADDED": 1, "ENTRIES": 32}
    padded = triton.next_power_of_2(part.counts.shape[1])
    return {"SEGMENT": part.segment, "PADDED": padded, "ENTRIES": max(32, min(128, 4096 // padded))}
