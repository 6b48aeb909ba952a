"""The product by strips against the torch reference and a float64 truth, in Triton's interpreter.

Run by `test_kernels.py` beside `interpreted_kernels.py`, with its dtypes.
Errors are relative to the largest entry that the sum of magnitudes allows: those of a sum of T
products in fp32, and one rounding to the dtype of the factors.
"""

from __future__ import annotations

import pytest
import torch
from helpers import assert_as_good_as_plain_torch, make_linear4bit, random_inputs
from masks import MASKS, crowded, few
from sweeps import swept
from torch import Tensor

from leanlift import UserError
from leanlift.layers import LiftLinear, Scratch, Workspace
from leanlift.ops import tile_ops
from leanlift.ops.strips import strips_product
from leanlift.sparse import SegmentedIndex
from leanlift.weights.quantized import frozen_weight

pytestmark = pytest.mark.filterwarnings(  # of Triton's interpreter, which asks numpy for scalars
    "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"
)
CPU = torch.device("cpu")
SHAPES = [(128, 256), (256, 384), (130, 257), (33, 1100), (5, 7), (1, 1)]

each_shape = pytest.mark.parametrize(
    "shape", swept(SHAPES, (130, 257), whole=True), ids=lambda shape: "x".join(map(str, shape))
)
each_dtype = pytest.mark.parametrize(
    "dtype", swept([torch.float32, torch.float16], torch.float32), ids=str
)


def products(left: Tensor, right: Tensor, index: SegmentedIndex) -> tuple[Tensor, Tensor]:
    """The kernels' entries and the reference's, fp32 [k]."""
    ours, plain = (torch.full((index.count,), torch.nan) for _ in range(2))
    tile_ops("triton-strips", CPU).sampled_product(left, right, index, ours, Scratch().take)
    strips_product(left, right, index, plain, Scratch().take)
    return ours, plain


def assert_as_exact(left: Tensor, right: Tensor, index: SegmentedIndex) -> None:
    """The kernels' error is at most the reference's and a rounding of fp32 sums."""
    ours, plain = products(left, right, index)
    flat = index.to_flat()
    truth = (left.double().T @ right.double()).view(-1)[flat]
    size = (left.double().abs().T @ right.double().abs()).view(-1)[flat]
    sums = 2 * torch.finfo(torch.float32).eps * left.shape[0] ** 0.5
    rounding = 0 if left.dtype == torch.float32 else torch.finfo(left.dtype).eps / 2
    bound = sums * size + rounding * truth.abs() + torch.finfo(left.dtype).tiny
    for got in (ours, plain):
        assert bool(((got - truth).abs() <= bound).all())


@each_shape
@each_dtype
@pytest.mark.parametrize("name", MASKS)
def test_entries_of_every_mask(shape: tuple[int, int], dtype: torch.dtype, name: str) -> None:
    index = MASKS[name](*shape)
    left, right = (torch.randn(70, side).to(dtype) for side in shape)
    assert_as_exact(left, right, index)


@pytest.mark.parametrize("tokens", swept([1, 63, 64, 65, 200], 65))
def test_any_number_of_tokens(tokens: int) -> None:
    assert_as_exact(torch.randn(tokens, 130), torch.randn(tokens, 257), crowded(130, 257))


@pytest.mark.thorough
def test_a_slice_of_a_large_matrix() -> None:
    assert_as_exact(torch.randn(20, 256), torch.randn(20, 11008), crowded(256, 11008, 0.02))


def test_rows_in_the_middle_and_factors_that_are_views() -> None:
    index = crowded(256, 300).part(64, 192)
    left, right = torch.randn(40, 256)[:, 64:192], torch.randn(300, 40).T
    assert_as_exact(left, right, index)


def test_scratch_that_holds_no_numbers_does_no_harm() -> None:
    def take(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full((rows, columns), torch.nan, dtype=dtype, device=device)

    index, out = crowded(130, 257), torch.empty(crowded(130, 257).count)
    left, right = torch.randn(65, 130), torch.randn(65, 257)
    tile_ops("triton-strips", CPU).sampled_product(left, right, index, out, take)
    assert bool(out.isfinite().all())


def test_blocks_that_are_not_listed_are_not_formed() -> None:
    index, lent = few(256, 384), []

    def take(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        lent.append(torch.full((rows, columns), torch.nan, dtype=dtype, device=device))
        return lent[-1]

    out = torch.empty(index.count)
    left, right = torch.randn(64, 256), torch.randn(64, 384)
    tile_ops("triton-strips", CPU).sampled_product(left, right, index, out, take)
    dense = lent[0].view(-1)[: 256 * 384]
    listed = int((index.strips.rows >= 0).sum())
    assert int(dense.isfinite().sum()) == listed * 128 < 256 * 384


def test_the_same_numbers_give_the_same_gradient() -> None:
    index = crowded(130, 257)
    left, right = torch.randn(65, 130), torch.randn(65, 257)
    once, again = (products(left, right, index)[0] for _ in range(2))
    assert torch.equal(once, again)


@each_dtype
def test_a_layer_trains_as_well_as_plain_torch(dtype: torch.dtype) -> None:
    base = make_linear4bit(130, 300)
    weight = frozen_weight(base)
    lift = LiftLinear(base, weight, crowded(130, 300), Workspace("triton-strips"))
    assert_as_good_as_plain_torch(lift, *random_inputs(lift, dtype=dtype))


def test_a_dtype_without_a_kernel_is_refused() -> None:
    index = crowded(130, 257)
    wide = torch.randn(3, 130).double(), torch.randn(3, 257).double()
    with pytest.raises(AssertionError, match="no kernel multiplies"):
        products(*wide, index)


def test_names_are_checked() -> None:
    with pytest.raises(UserError, match="expected ops among auto, torch, triton, triton-strips"):
        tile_ops("strips", CPU)
