"""Strips of sorted columns and the rows that have entries in them, against the dense mask."""

from __future__ import annotations

import pytest
import torch
from masks import MASKS, crowded

from leanlift.sparse import GROUP, STRIP, SegmentedIndex, strips_nbytes
from leanlift.sparse.index import DECODE_ROWS

SHAPES = [(1, 1), (5, 7), (128, 256), (130, 257), (300, 1100), (DECODE_ROWS + 3, 140)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
each_mask = pytest.mark.parametrize("name", MASKS)


def dense(index: SegmentedIndex) -> torch.Tensor:
    mask = torch.zeros(index.shape, dtype=torch.bool)
    mask.view(-1)[index.to_flat()] = True
    return mask


@each_shape
@each_mask
def test_rows_with_entries_are_listed_once_and_no_others(name: str, shape: tuple[int, int]) -> None:
    index = MASKS[name](*shape)
    strips, mask, (m, n) = index.strips, dense(index), shape
    sorted_ = torch.zeros(m, strips.width, dtype=torch.bool)
    sorted_[:, :n] = mask[:, strips.order[:n].long()]
    listed = torch.zeros(m, strips.width // STRIP, dtype=torch.int64)
    for group, strip in zip(strips.rows.tolist(), strips.strips.tolist(), strict=True):
        rows = [row for row in group if row >= 0]
        assert rows == sorted(rows)
        assert rows  # no group is for nothing
        listed[rows, strip] += 1
    assert torch.equal(listed, sorted_.view(m, -1, STRIP).any(2).long())
    assert strips.strips.tolist() == sorted(strips.strips.tolist())


@each_shape
@each_mask
def test_columns_are_sorted_by_their_entries(name: str, shape: tuple[int, int]) -> None:
    index, n = MASKS[name](*shape), shape[1]
    strips = index.strips
    counts = dense(index).sum(0)[strips.order.long()]
    assert bool((counts[:n].diff() <= 0).all())
    assert sorted(strips.order[:n].tolist()) == list(range(n))
    assert torch.equal(strips.order[strips.ranks.long()], torch.arange(n, dtype=torch.int32))
    assert strips.width == -(-n // STRIP) * STRIP
    assert bool((strips.order[n:] == strips.order[n - 1]).all())


@each_shape
@each_mask
def test_bytes_are_bounded_by_shapes_alone(name: str, shape: tuple[int, int]) -> None:
    index = MASKS[name](*shape)
    parts = (index.strips.order, index.strips.ranks, index.strips.rows, index.strips.strips)
    assert index.strips.nbytes == sum(part.nbytes for part in parts)
    bound = strips_nbytes(shape, index.count)
    assert index.strips.nbytes <= bound
    if name in ("full", "empty"):
        assert index.strips.nbytes == bound


def test_a_crowded_mask_needs_less_than_a_random_one() -> None:
    crowd, anywhere = crowded(1024, 1024), MASKS["random"](1024, 1024)
    assert anywhere.strips.formed == 1024 * 1024
    assert crowd.strips.formed < 0.7 * anywhere.strips.formed
    assert crowd.strips.formed == crowd.strips.rows.shape[0] * GROUP * STRIP


def test_many_rows_take_wider_numbers() -> None:
    tall = SegmentedIndex.from_flat(torch.tensor([0, 2 * 40_000 - 1]), (40_000, 2))
    assert tall.strips.rows.dtype == torch.int32
    assert tall.strips.rows[0, :3].tolist() == [0, 39_999, -1]
    assert tall.strips.nbytes <= strips_nbytes(tall.shape, 2)
    assert crowded(128, 256).strips.rows.dtype == torch.int16


def test_they_are_made_once_for_a_mask_and_anew_for_another() -> None:
    index = crowded(130, 257)
    assert index.strips is index.strips
    assert index.part(0, 130).strips is index.strips
    moved = index.to(torch.device("cpu"))
    assert moved.strips is not index.strips
    assert torch.equal(moved.strips.rows, index.strips.rows)


def test_a_range_of_rows_has_its_own() -> None:
    index = crowded(256, 300)
    part = index.part(64, 192)
    mask = dense(index)[64:192]
    own = SegmentedIndex.from_flat(mask.reshape(-1).nonzero().squeeze(1), (128, 300)).strips
    for ours, other in zip(vars(part.strips).values(), vars(own).values(), strict=True):
        assert torch.equal(ours, other)
