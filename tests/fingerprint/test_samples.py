"""Samples of a matrix: where they lie, and that a file keeps them."""

from __future__ import annotations

import pytest
import torch
from helpers import random_weight

from leanlift.fingerprint.cells import dense_cells, entries_of
from leanlift.fingerprint.samples import Sample, decode, positions, spread
from leanlift.tiles import as_tiles


@pytest.mark.parametrize("entries", [1, 2, 47, 48, 49, 2**24 + 1, 20132608, 2**31 - 3, 2**40 + 1])
def test_of_any_number_of_trained_entries_the_first_and_the_last_are_among_them(
    entries: int,
) -> None:
    class Mask:
        """Stands for as many positions, each its own number, without holding them."""

        def numel(self) -> int:
            return entries

        def cpu(self) -> Mask:
            return self

        def __getitem__(self, at: torch.Tensor) -> torch.Tensor:
            assert 0 <= int(at[0]) <= int(at[-1]) < entries
            assert len(at) == min(entries, 48)
            return at

    flat = positions(2 * entries, Mask(), 1)  # type: ignore[arg-type]
    assert {0, entries - 1} <= set(flat.tolist())


def test_samples_survive_the_text_and_lie_where_they_should() -> None:
    mask = torch.arange(5, 4000, 7)
    flat = positions(64 * 64, mask, 1)
    assert int(torch.isin(flat, mask).sum()) >= 48
    assert torch.equal(spread(64 * 64, 16), spread(64 * 64, 16))
    assert int(spread(10**12, 256)[0]) == 0
    assert len(positions(64 * 64, mask, 10**6)) < 10
    assert len(positions(3, torch.empty(0, dtype=torch.int64), 1)) == 3
    cells = dense_cells(random_weight(64, 64).reshape(-1)[flat], torch.bfloat16)
    back = decode(Sample(flat, cells).encode(), 64 * 64)
    assert torch.equal(back.flat, flat)
    torch.testing.assert_close(back.cells.low, cells.low)
    tiles = as_tiles(torch.arange(12.0).view(3, 4))
    assert entries_of(tiles, torch.tensor([1, 6, 11])).tolist() == [1, 6, 11]
