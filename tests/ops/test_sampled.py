"""Chosen entries of a product, against all of them in fp64."""

from __future__ import annotations

import pytest
import torch

from leanlift.layers import Scratch
from leanlift.ops import tile_ops
from leanlift.ops.sampled import SAMPLED_DENSITY, TOKENS, compressed_rows
from leanlift.sparse import SegmentedIndex

CPU = torch.device("cpu")


def index_of(m: int, n: int, density: float) -> SegmentedIndex:
    mask = torch.rand(m, n) < density
    mask[m // 2] = False  # a row without entries
    return SegmentedIndex.from_flat(mask.view(-1).nonzero().squeeze(1), (m, n))


@pytest.mark.parametrize("tokens", [1, TOKENS, 2 * TOKENS + 37])
@pytest.mark.parametrize("shape", [(64, 256), (130, 600)])
@pytest.mark.parametrize("density", [0.05, 0.5], ids=["sampled", "dense"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_entries_of_a_product(
    tokens: int, shape: tuple[int, int], density: float, dtype: torch.dtype
) -> None:
    m, n = shape
    index = index_of(m, n, density)
    assert (index.count <= SAMPLED_DENSITY * m * n) == (density == 0.05)
    left, right = torch.randn(tokens, m).to(dtype), torch.randn(tokens, n).to(dtype)
    out_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.full((index.count,), torch.nan, dtype=out_dtype)
    scratch = Scratch()
    tile_ops("torch", CPU).sampled_product(left, right, index.part(0, m), out, scratch.take)
    exact = (left.double().T @ right.double()).view(-1)[index.to_flat()]
    # sampled: sums of at most `tokens` rounded products in fp32; dense: rounded to dtype besides
    sampled = density == 0.05 or dtype == torch.float64
    eps = torch.finfo(out_dtype if sampled else dtype).eps
    size = (left.double().abs().T @ right.double().abs()).view(-1)[index.to_flat()]
    assert bool(((out - exact).abs() <= 4 * eps * size * (tokens**0.5 if sampled else 1)).all())
    assert (scratch.nbytes == 0) == (density == 0.05)  # nothing dense was formed


def test_bfloat16_values_take_the_sums_rounded_once() -> None:
    index = index_of(64, 256, 0.05)
    left, right = torch.randn(300, 64), torch.randn(300, 256)
    wide, narrow = torch.empty(index.count), torch.empty(index.count, dtype=torch.bfloat16)
    for out in (wide, narrow):
        tile_ops("torch", CPU).sampled_product(left, right, index.part(0, 64), out, Scratch().take)
    assert torch.equal(narrow, wide.bfloat16())


def test_rows_in_the_middle_as_csr_has_them() -> None:
    index = index_of(200, 600, 0.05)
    totals, columns = compressed_rows(index.part(64, 192))
    mask = torch.zeros(200, 600)
    mask.view(-1)[index.to_flat()] = 1
    csr = mask[64:192].to_sparse_csr()
    assert torch.equal(totals, csr.crow_indices().int())
    assert torch.equal(columns, csr.col_indices().int())


def test_an_empty_mask() -> None:
    index = SegmentedIndex.from_flat(torch.empty(0, dtype=torch.int64), (64, 256))
    out = torch.empty(0)
    left, right = torch.randn(3, 64), torch.randn(3, 256)
    tile_ops("torch", CPU).sampled_product(left, right, index.part(0, 64), out, Scratch().take)
