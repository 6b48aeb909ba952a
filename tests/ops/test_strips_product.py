"""Entries of a product by strips of sorted columns, in plain torch, against all of them in fp64."""

from __future__ import annotations

import pytest
import torch
from masks import MASKS, few

from leanlift import UserError
from leanlift.layers import Scratch
from leanlift.ops import resolve, tile_ops
from leanlift.ops.strips import strips_product

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("shape", [(128, 256), (130, 257), (5, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_entries_of_a_product(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    index = MASKS[name](*shape)
    left, right = (torch.randn(40, side).to(dtype) for side in shape)
    out = torch.full((index.count,), torch.nan, dtype=torch.float64)
    strips_product(left, right, index, out, Scratch().take)
    flat = index.to_flat()
    exact = (left.double().T @ right.double()).view(-1)[flat]
    size = (left.double().abs().T @ right.double().abs()).view(-1)[flat]
    # rounded once in bf16, else at each of the sums
    roundings = 1 if dtype == torch.bfloat16 else 40**0.5
    assert bool(((out - exact).abs() <= torch.finfo(dtype).eps * roundings * size).all())


def test_only_what_is_listed_is_formed() -> None:
    index, lent = few(256, 384), []

    def take(m: int, n: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        lent.append(torch.full((m, n), torch.nan, dtype=dtype, device=device))
        return lent[-1]

    out = torch.empty(index.count)
    strips_product(torch.randn(40, 256), torch.randn(40, 384), index, out, take)
    listed = int((index.strips.rows >= 0).sum())
    assert int(lent[0].isfinite().sum()) == listed * 128 < 256 * 384


def test_it_is_asked_for_by_name_alone() -> None:
    with pytest.raises(UserError, match="ops=triton-strips needs"):
        tile_ops("triton-strips", CPU)
    assert "strips" not in resolve("auto", CPU)
