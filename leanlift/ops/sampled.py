"""Chosen entries of a product, without the others: on a CPU, where a dense product is no bargain.

torch has it as `sampled_addmm` on CSR matrices: one dot product per entry. A 5 % mask takes a
twentieth of the dense product's arithmetic; in memory-bound practice a quarter of its time in fp32
and six tenths in bf16. On a GPU the dense product is faster, since tensor cores do it.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from leanlift.sparse import SEGMENT, SegmentedIndex

SAMPLED_DENSITY = 0.1
"""Share of entries up to which this way is the faster one."""

TOKENS = 128
"""Taken at once: columns of the right factor are read at random, and that many of a few thousand
stay in a CPU's cache."""


def sampled_product_(left: Tensor, right: Tensor, index: SegmentedIndex, out: Tensor) -> None:
    """Write the entries `index` of left^T [r, T] @ right [T, n] to `out` [k].

    Products and sums are in fp32, in fp64 where `left` is. Temporary memory: 8 bytes an entry and
    `TOKENS` fp32 columns of both factors.
    """
    wide = torch.float64 if left.dtype == torch.float64 else torch.float32
    totals, columns = compressed_rows(index)
    sums = out.zero_() if out.dtype == wide else torch.zeros_like(out, dtype=wide)
    for start in range(0, left.shape[0], TOKENS):
        # not both at once: turning while widening takes several times as long
        rows, others = (f[start : start + TOKENS].T.contiguous().to(wide) for f in (left, right))
        _add_sampled(totals, columns, rows, others, sums)
    if sums is not out:
        out.copy_(sums)


def compressed_rows(index: SegmentedIndex) -> tuple[Tensor, Tensor]:
    """The entries as CSR has them: entries before each row int32 [r + 1], columns int32 [k]."""
    (rows, segments), device = index.counts.shape, index.columns.device
    totals = torch.zeros(rows + 1, dtype=torch.int32, device=device)
    torch.sub(index.ends, index.first, out=totals[1:])
    first = torch.arange(segments, dtype=torch.int32, device=device).mul_(SEGMENT)
    counts = index.counts.reshape(-1).int()
    columns = torch.repeat_interleave(first.repeat(rows), counts, output_size=index.count)
    return totals, columns.add_(index.columns)


@torch.library.custom_op("leanlift::add_sampled", mutates_args=("sums",))
def _add_sampled(
    totals: Tensor, columns: Tensor, left: Tensor, right: Tensor, sums: Tensor
) -> None:
    """sums [k] += entries of left [r, T] @ right [n, T]^T at the CSR positions.

    An operator of its own because fake tensors, which plans are made with, know no CSR.
    """
    shape = left.shape[0], right.shape[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's CSR is "in beta"
        matrix = torch.sparse_csr_tensor(totals, columns, sums, shape, check_invariants=False)
    torch.sparse.sampled_addmm(matrix, left, right.T, beta=1.0, out=matrix)


@_add_sampled.register_fake
def _(totals: Tensor, columns: Tensor, left: Tensor, right: Tensor, sums: Tensor) -> None:
    return None
