"""RowTiles: what counts as tiles, how tall a tile is, and that ranges cover a matrix exactly."""

from __future__ import annotations

import pytest
import torch
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st

from leanlift.tiles import (
    DEFAULT_TILE_BYTES,
    TILE_ROW_MULTIPLE,
    DenseTiles,
    RowTiles,
    as_tiles,
    row_ranges,
    tile_rows,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dense_tiles_describe_their_tensor(dtype: torch.dtype) -> None:
    tensor = torch.randn(5, 7).to(dtype)
    tiles = DenseTiles(tensor)
    assert isinstance(tiles, RowTiles)
    assert tiles.shape == (5, 7)
    assert tiles.dtype == dtype
    assert tiles.device == tensor.device


def test_dense_rows_are_views_of_the_right_rows() -> None:
    tensor = torch.randn(5, 7)
    rows = DenseTiles(tensor).rows(2, 4)
    assert torch.equal(rows, tensor[2:4])
    assert rows.data_ptr() == tensor[2].data_ptr()


@pytest.mark.parametrize("shape", [(), (6,), (2, 3, 4)], ids=["0d", "1d", "3d"])
def test_dense_tiles_refuse_what_is_not_a_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected a 2-D tensor, got shape"):
        as_tiles(torch.zeros(shape))


def test_as_tiles_wraps_tensors_and_passes_tiles_through() -> None:
    tensor = torch.randn(3, 2)
    wrapped = as_tiles(tensor)
    assert isinstance(wrapped, DenseTiles)
    assert wrapped.tensor is tensor
    assert as_tiles(wrapped) is wrapped


@examples(200)
@given(
    n=st.integers(0, 10**7),
    itemsize=st.sampled_from([1, 2, 4, 8]),
    tile_bytes=st.integers(0, 2**32),
)
def test_a_tile_is_a_positive_multiple_of_64_rows_of_about_the_bytes_asked_for(
    n: int, itemsize: int, tile_bytes: int
) -> None:
    rows = tile_rows(n, itemsize, tile_bytes)
    row = max(1, n * itemsize)
    assert rows > 0
    assert rows % TILE_ROW_MULTIPLE == 0
    assert rows == TILE_ROW_MULTIPLE or rows * row <= tile_bytes
    assert (rows + TILE_ROW_MULTIPLE) * row > tile_bytes


def test_the_default_tile_of_an_8b_model_is_32_mib() -> None:
    assert DEFAULT_TILE_BYTES == 32 * 2**20
    assert tile_rows(4096, 4) == 2048
    assert tile_rows(11008, 4) == 704


@examples(100)
@given(m=st.integers(0, 500), step=st.integers(1, 600))
def test_row_ranges_cover_every_row_once_in_order(m: int, step: int) -> None:
    ranges = list(row_ranges(m, step))
    assert [row for start, stop in ranges for row in range(start, stop)] == list(range(m))
    assert all(0 < stop - start <= step for start, stop in ranges)
    assert all(start % step == 0 for start, _ in ranges)
