"""What a stored weight says about the one that it was made from.

A number that was rounded or quantized came from somewhere in an interval, its *cell*: half a unit
in the last place about a bf16 number, all that is nearest to one of sixteen codes for an NF4 one.
The cells of one weight in two forms have a point in common; so do not those of two weights that
differ by more than the coarser form. That is how a base is known again in whatever form it comes,
and how its twin, or its own merge, is not taken for it.

A cell is wide enough for what bitsandbytes does: the weight was rounded to the dtype of loading
first, and scales that are quantized themselves (double quantization) are known to a step of their
table. NF4 and FP4 take the nearest code on every device, INT8 rounds.

Shapes: s positions, flat int64 [s], of a matrix m x n.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leanlift.ops import EightBit, FourBit
from leanlift.tiles import RowTiles

NESTED_STEP = 0.0075
"""Half the widest step of bitsandbytes' 8-bit map, as a share of its absmax (0.0070), and a bit."""

FOUR_BIT_KINDS = ("nf4", "fp4")
"""By whether the table has two zeros."""

KINDS = (*FOUR_BIT_KINDS, "int8", "dense")

SMALL = 2**16
"""Entries of a matrix that is read whole, which takes less time than its rows one by one."""

SLACK = 0.02
"""Of a cell's width, on either side: where sums are rounded differently by device."""


@dataclass(frozen=True)
class Cells:
    """Cells at positions: low and high, fp64 [s]; kind as `WeightFormat` has it."""

    low: Tensor
    high: Tensor
    kind: str = "dense"

    def agree(self, other: Cells) -> Tensor:
        """Whether both can be cells of one weight: bool [s].

        They have a point in common; and where they are of one kind and about one width, they are
        the same cell, and not neighbours.
        """
        meet = (self.low <= other.high) & (other.low <= self.high)
        apart = (self.low + self.high - other.low - other.high).abs() / 2
        one, two = self.high - self.low, other.high - other.low
        narrow, wide = torch.minimum(one, two), torch.maximum(one, two)
        size = torch.maximum(self.high.abs(), self.low.abs())
        if self.kind != other.kind:
            return meet
        return meet & ~((wide <= 2 * narrow) & (apart > narrow / 2 + 2e-7 * size))


def dense_cells(values: Tensor, dtype: torch.dtype) -> Cells:
    """Cells of numbers that were rounded to `dtype`."""
    wide = values.detach().double().cpu()
    info = torch.finfo(dtype)
    power = torch.ldexp(torch.ones_like(wide), torch.frexp(wide).exponent - 1)
    reach = power.clamp_min(info.smallest_normal) * (info.eps / 2)
    return Cells(wide - reach, wide + reach)


def four_bit_cells(stored: FourBit, flat: Tensor, dtype: torch.dtype, kind: str) -> Cells:
    """Cells of a 4-bit matrix of this kind that was quantized from `dtype`."""
    flat = flat.to(stored.packed.device)
    codes = stored.packed[flat // 2].long()
    codes = torch.where(flat % 2 == 0, codes >> 4, codes & 15)
    scale, doubt = _scales(stored, flat // stored.blocksize)
    table, order = stored.table.double().cpu().sort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    borders = torch.cat([table[:1], (table[1:] + table[:-1]) / 2, table[-1:]])
    place = rank[codes.cpu()]
    below, above = borders[place], borders[place + 1]
    # FP4 has two zeros, which of them is chosen says nothing: both have the cell about zero.
    zero = (table == 0).nonzero().flatten()
    at_zero = table[place] == 0
    below = torch.where(at_zero, borders[zero.min()], below)
    above = torch.where(at_zero, borders[zero.max() + 1], above)
    ends = torch.stack([below * (scale - doubt), below * (scale + doubt),
                        above * (scale - doubt), above * (scale + doubt)])  # fmt: skip
    return _loosened(ends.amin(0), ends.amax(0), dtype, kind)


def _scales(stored: FourBit, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of blocks in fp64, and by how much each may be off."""
    nested = stored.nested
    if nested is None:
        scale = stored.absmax[blocks].double().cpu()
        return scale, torch.zeros_like(scale)
    inner = nested.absmax[blocks // nested.blocksize].double().cpu()
    steps = nested.table[stored.absmax[blocks].long()].double().cpu()
    return steps * inner + float(nested.offset), NESTED_STEP * inner.abs()


def eight_bit_cells(stored: EightBit, flat: Tensor, dtype: torch.dtype) -> Cells:
    """Cells of an INT8 matrix that was loaded in `dtype` and quantized from fp16."""
    flat = flat.to(stored.codes.device)
    n = stored.codes.shape[1]
    codes = stored.codes[flat // n, flat % n].double().cpu()
    step = stored.scales[flat // n].double().cpu() / 127
    coarser = max(dtype, torch.float16, key=lambda kind: torch.finfo(kind).eps)
    return _loosened((codes - 0.5) * step, (codes + 0.5) * step, coarser, "int8")


def cells_of(weight: RowTiles, flat: Tensor, dtype: torch.dtype) -> Cells:
    """Cells of a matrix in any form.

    Args:
        weight: the matrix; a quantized one offers its stored form.
        flat: positions.
        dtype: in which it was loaded before it was quantized.
    """
    stored = weight.stored() if hasattr(weight, "stored") else None
    if isinstance(stored, FourBit):
        coarser = max(dtype, weight.dtype, key=lambda kind: torch.finfo(kind).eps)
        nearest = FOUR_BIT_KINDS[bool((stored.table == 0).sum() > 1)]
        return four_bit_cells(stored, flat, coarser, nearest)
    if isinstance(stored, EightBit):
        return eight_bit_cells(stored, flat, dtype)
    return dense_cells(entries_of(weight, flat), weight.dtype)


def entries_of(weight: RowTiles, flat: Tensor) -> Tensor:
    """Entries of a matrix [s]: at once where it can or is small, else by rows, each row once."""
    if hasattr(weight, "entries"):
        return weight.entries(flat)
    m, n = weight.shape
    if m * n <= SMALL:
        return weight.rows(0, m).reshape(-1)[flat.to(weight.device)].cpu()
    found = torch.empty(flat.numel(), dtype=weight.dtype)
    rows = flat // n
    for row in rows.unique().tolist():
        here = rows == row
        found[here] = weight.rows(row, row + 1)[0, flat[here].to(weight.device) % n].cpu()
    return found


def _loosened(low: Tensor, high: Tensor, dtype: torch.dtype, kind: str) -> Cells:
    """Wider by what rounding to `dtype` first does, and by the slack."""
    eps = torch.finfo(dtype).eps / 2
    slack = SLACK * (high - low)
    return Cells(low - low.abs() * eps - slack, high + high.abs() * eps + slack, kind)
