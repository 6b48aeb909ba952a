"""The compact store: exact positions in about a byte each, and nothing lost when a mask changes."""

from __future__ import annotations

import pytest
import torch
from helpers import bits, examples, random_flat
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leanlift.measure import LiveBytes
from leanlift.sparse import (
    LayerOffsets,
    Offsets,
    SegmentedIndex,
    add_offsets_,
    change_mask,
    encoding_nbytes,
    index_nbytes,
)
from leanlift.sparse.offsets import common

Shape = tuple[int, int]


def _shape_id(shape: Shape) -> str:
    return f"{shape[0]}x{shape[1]}"


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """A bool mask [m, n] of up to 300,000 entries, on either side of every segment boundary."""
    n = draw(st.sampled_from([1, 2, 7, 254, 255, 256, 257, 509, 510, 511, 765, 1000, 65537, 70001]))
    m = draw(st.integers(1, min(200, 300_000 // n)))
    density = draw(st.sampled_from([0.0, 0.001, 0.05, 0.5, 0.99, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    mask = torch.rand(m, n, generator=generator) < density
    emptied, filled = draw(st.integers(0, m - 1)), draw(st.integers(0, m - 1))
    if draw(st.booleans()):
        mask[emptied] = False
    if draw(st.booleans()):
        mask[filled] = True
    return mask


def _flat(mask: Tensor) -> Tensor:
    return mask.reshape(-1).nonzero().squeeze(1)


def _encode(mask: Tensor) -> SegmentedIndex:
    m, n = mask.shape
    return SegmentedIndex.from_flat(_flat(mask), (m, n))


@examples(120)
@given(mask=masks())
def test_any_mask_comes_back_exactly(mask: Tensor) -> None:
    m, n = mask.shape
    index = _encode(mask)
    flat = index.to_flat()
    assert flat.dtype == torch.int64
    assert torch.equal(flat, _flat(mask))
    assert index.count == int(mask.sum())
    assert index.nbytes == index_nbytes((m, n), index.count)
    parts = (index.columns, index.counts, index.ends, index.anchors)
    assert index.nbytes == sum(part.nbytes for part in parts)


@examples(120)
@given(mask=masks(), data=st.data())
def test_any_row_range_decodes_to_its_own_positions(mask: Tensor, data: st.DataObject) -> None:
    m, _ = mask.shape
    start = data.draw(st.integers(0, m), "start")
    stop = data.draw(st.integers(start, m), "stop")
    index = _encode(mask)
    decoded = index.decode(start, stop)
    assert torch.equal(decoded, _flat(mask[start:stop]))
    assert bool((decoded.diff() > 0).all())
    before = int(mask[:start].sum())
    assert index.span(start, stop) == (before, before + decoded.numel())


@examples(60)
@given(mask=masks())
def test_the_stored_parts_rebuild_the_index(mask: Tensor) -> None:
    index = _encode(mask)
    again = SegmentedIndex.from_parts(index.shape, index.columns, index.counts)
    assert torch.equal(again.to_flat(), index.to_flat())
    assert torch.equal(again.anchors, index.anchors)


@pytest.mark.parametrize("n", [1, 254, 255, 256, 511, 65537])
@pytest.mark.parametrize("mask", ["empty", "full", "one-row", "last-entry"])
def test_extreme_masks(n: int, mask: str) -> None:
    shape = (3, n)
    flat = {
        "empty": torch.arange(0),
        "full": torch.arange(3 * n),
        "one-row": torch.arange(n, 2 * n),
        "last-entry": torch.tensor([3 * n - 1]),
    }[mask]
    index = SegmentedIndex.from_flat(flat, shape)
    assert torch.equal(index.to_flat(), flat)
    per_row = torch.bincount(flat // n, minlength=3).tolist()
    assert [index.decode(row, row + 1).numel() for row in range(3)] == per_row


@pytest.mark.parametrize(
    "shape", [(4096, 11008), (4096, 4096), (11008, 4096), (1024, 4096), (192, 576)], ids=_shape_id
)
def test_a_position_costs_at_most_a_byte_and_a_quarter_at_five_per_cent(shape: Shape) -> None:
    count = shape[0] * shape[1] // 20
    assert index_nbytes(shape, count) <= 1.25 * count


def test_a_real_sized_index() -> None:
    m, n = 4096, 11008
    mask = torch.rand(m, n, generator=torch.Generator().manual_seed(0)) < 0.05
    index = _encode(mask)
    held = sum(p.nbytes for p in (index.columns, index.counts, index.ends, index.anchors))
    assert held == index.nbytes == index_nbytes((m, n), index.count)
    assert held <= 1.25 * index.count
    assert torch.equal(index.decode(1000, 1704), _flat(mask[1000:1704]))


@examples(40)
@given(mask=masks(), at_once=st.sampled_from([1000, 4093, 2**16]))
def test_positions_that_are_encoded_in_pieces_give_the_same_index(
    mask: Tensor, at_once: int
) -> None:
    whole = _encode(mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("leanlift.sparse.index.ENCODED_AT_ONCE", at_once)
        pieces = _encode(mask)
    for part in ("columns", "counts", "ends", "anchors"):
        assert torch.equal(getattr(pieces, part), getattr(whole, part)), part


def test_encoding_takes_what_the_rule_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanlift.sparse.index.ENCODED_AT_ONCE", 2**12)
    for shape in ((2000, 800), (70, 5000)):
        flat = random_flat(*shape, shape[0] * shape[1] // 10)
        with LiveBytes() as live:
            index = SegmentedIndex.from_flat(flat, shape)
        assert live.peak <= index.nbytes + encoding_nbytes(flat.numel()) < 8 * flat.numel()


def test_a_position_out_of_order_is_seen_between_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanlift.sparse.index.ENCODED_AT_ONCE", 4)
    for at in range(11):
        flat = torch.arange(0, 24, 2)
        flat[at + 1] = flat[at]
        with pytest.raises(ValueError, match="strictly increasing"):
            SegmentedIndex.from_flat(flat, (3, 8))


@pytest.mark.parametrize(
    "flat",
    [
        torch.tensor([3, 2]),
        torch.tensor([2, 2]),
        torch.tensor([-1, 2]),
        torch.tensor([0, 12]),
        torch.tensor([1, 2], dtype=torch.int32),
        torch.tensor([[1, 2]]),
    ],
    ids=["unsorted", "duplicate", "negative", "beyond-the-end", "int32", "2d"],
)
def test_from_flat_refuses_what_is_not_a_sorted_set(flat: Tensor) -> None:
    with pytest.raises(ValueError, match="expected"):
        SegmentedIndex.from_flat(flat, (3, 4))


@pytest.mark.parametrize(
    ("columns", "counts", "message"),
    [
        ([0, 1], [[1, 0], [0, 0]], "counts say 1 entries, but there are 2"),
        ([1, 0], [[2, 0], [0, 0]], "not sorted"),
        ([1, 1], [[0, 0], [2, 0]], "not sorted"),
        ([255], [[1, 0], [0, 0]], "outside its segment"),
        ([45], [[0, 0], [0, 1]], "outside its segment"),
        ([0], [[1, 0]], r"expected counts as uint8 \[2, 2\]"),
    ],
    ids=["wrong-total", "unsorted", "duplicate", "beyond-segment", "beyond-row", "rows-missing"],
)
def test_from_parts_refuses_damaged_parts(
    columns: list[int], counts: list[list[int]], message: str
) -> None:
    """Two rows of 300 columns: segments of 255 and 45."""
    columns_u8 = torch.tensor(columns, dtype=torch.uint8)
    counts_u8 = torch.tensor(counts, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        SegmentedIndex.from_parts((2, 300), columns_u8, counts_u8)


def test_from_parts_refuses_other_dtypes() -> None:
    column, count = torch.tensor([3]), torch.tensor([[1]])
    with pytest.raises(ValueError, match=r"expected columns as 1-D uint8, got torch\.int64"):
        SegmentedIndex.from_parts((1, 9), column, count.to(torch.uint8))
    with pytest.raises(ValueError, match="expected counts as uint8"):
        SegmentedIndex.from_parts((1, 9), column.to(torch.uint8), count)


@pytest.mark.parametrize("shape", [(128, 256), (65, 257)], ids=_shape_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["fp32 values", "values of that dtype"])
def test_offsets_are_added_in_fp32_and_rounded_once(
    shape: Shape, dtype: torch.dtype, own: bool
) -> None:
    m, n = shape
    flat = random_flat(m, n, m * n // 10)
    values = torch.randn(flat.numel()).to(dtype if own else torch.float32)
    index = SegmentedIndex.from_flat(flat, shape)
    dense = torch.randn(shape).to(dtype)
    wide = dense.float().view(-1).clone()
    wide[flat] += values
    truth = wide.view(shape).to(dtype)
    for start, stop in [(0, m), (0, 64), (13, 50), (64, m), (7, 7)]:
        rows = dense[start:stop].clone()
        add_offsets_(rows, Offsets(index, values).rows(start, stop))
        assert torch.equal(rows, truth[start:stop])


def test_moving_an_index_leaves_the_anchors_on_the_cpu() -> None:
    index = SegmentedIndex.from_flat(random_flat(70, 300, 900), (70, 300))
    moved = index.map(lambda tensor: tensor.to("meta"))
    assert {moved.columns.device.type, moved.counts.device.type} == {"meta"}
    assert moved.span(0, 64) == index.span(0, 64)


# --- a mask changes ------------------------------------------------------------------------

SHAPE = (4, 10)
PLACES = 40
SPECIAL_BITS = [0, -(2**31), 1, 0x3F800000, 0x7F800000, 0x7FC00000]
"""Bit patterns of 0.0, -0.0, the smallest subnormal, 1.0, infinity and NaN."""

Store = dict[int, int]
"""position -> bit pattern of its fp32 offset"""


@st.composite
def stores_and_mask(draw: st.DrawFn) -> tuple[Store, Store, list[int]]:
    """(active, retired, new mask): active and retired share no position."""
    patterns = st.sampled_from(SPECIAL_BITS) | st.integers(0, 0x7F7FFFFF)
    order = draw(st.permutations(range(PLACES)))
    count = draw(st.integers(0, 20))
    retired = draw(st.integers(0, PLACES - count))
    wanted = draw(st.permutations(range(PLACES)))[:count]
    active = {place: draw(patterns) for place in order[:count]}
    asleep = {place: draw(patterns) for place in order[count : count + retired]}
    return active, asleep, sorted(wanted)


def _offsets(store: Store) -> Offsets:
    places = sorted(store)
    patterns = torch.tensor([store[place] for place in places], dtype=torch.int32)
    flat = torch.tensor(places, dtype=torch.int64)
    return Offsets.from_flat(flat, patterns.view(torch.float32), SHAPE)


def _store(offsets: Offsets | None) -> Store:
    if offsets is None:
        return {}
    flat = offsets.index.to_flat()
    assert flat.tolist() == sorted(set(flat.tolist()))
    return dict(zip(flat.tolist(), offsets.values.view(torch.int32).tolist(), strict=True))


def _is_zero(pattern: int) -> bool:
    return pattern in (0, -(2**31))


@examples(300)
@given(case=stores_and_mask())
def test_a_mask_change_loses_nothing(case: tuple[Store, Store, list[int]]) -> None:
    """Against a dict: survivors bit for bit, leavers retire, the returning get theirs back."""
    active, asleep, wanted = case
    learned = LayerOffsets(_offsets(active), _offsets(asleep) if asleep else None)
    change = change_mask(learned, torch.tensor(wanted, dtype=torch.int64))

    expected = {place: active.get(place, asleep.get(place, 0)) for place in wanted}
    left = {p: v for p, v in active.items() if p not in expected and not _is_zero(v)}
    remain = {p: v for p, v in asleep.items() if p not in expected}
    assert _store(change.learned.active) == expected
    assert _store(change.learned.retired) == left | remain

    old = sorted(active)
    source = [old.index(place) if place in active else -1 for place in wanted]
    assert change.source.tolist() == source
    assert change.churn == pytest.approx(sum(s < 0 for s in source) / max(1, len(wanted)))


def test_a_small_mask_change_by_hand() -> None:
    def at(*places: int, values: list[float]) -> Offsets:
        return Offsets.from_flat(torch.tensor(places), torch.tensor(values), (2, 6))

    learned = LayerOffsets(
        at(2, 5, 7, 9, values=[0.5, 0.0, -1.0, 2.0]), at(3, 6, values=[0.25, 4.0])
    )
    change = change_mask(learned, torch.tensor([1, 3, 7, 8]))
    retired = change.learned.retired
    assert retired is not None
    assert change.learned.active.values.tolist() == [0.0, 0.25, -1.0, 0.0]
    assert change.source.tolist() == [-1, -1, 2, -1]
    assert retired.index.to_flat().tolist() == [2, 6, 9]
    assert retired.values.tolist() == [0.5, 4.0, 2.0]
    assert (change.churn, change.retired_count) == (0.75, 3)


def test_going_there_and_back_restores_every_offset() -> None:
    flat, other = random_flat(20, 20, 60, seed=1), random_flat(20, 20, 60, seed=2)
    learned = LayerOffsets(Offsets.from_flat(flat, torch.randn(60), (20, 20)))
    back = change_mask(change_mask(learned, other).learned, flat).learned
    assert torch.equal(bits(back.active.values), bits(learned.active.values))
    assert back.retired is None


@examples(50)
@given(data=st.data())
def test_rows_of_rows_are_the_rows(data: st.DataObject) -> None:
    """A range of an index is an index, and so is a range of that, whatever rows they begin at."""
    m, n = 150, 300
    flat = random_flat(m, n, data.draw(st.sampled_from([0, 1, 400, 4000])))
    whole = Offsets.from_flat(flat, torch.randn(flat.numel()), (m, n))
    start, stop = sorted(data.draw(st.tuples(st.integers(0, m), st.integers(0, m))))
    one, two = sorted(data.draw(st.tuples(*[st.integers(0, stop - start)] * 2)))
    part = whole.rows(start, stop).rows(one, two)
    expected = (flat >= (start + one) * n) & (flat < (start + two) * n)
    assert torch.equal(part.index.to_flat(), flat[expected] - (start + one) * n)
    assert torch.equal(part.values, whole.values[expected])
    assert part.index.first == int((flat < (start + one) * n).sum())
    assert part.index.shape == (two - one, n)


def test_what_two_sets_have_in_common_is_counted_without_all_of_their_positions() -> None:
    shape, generator = (6000, 64), torch.Generator().manual_seed(0)
    order = torch.randperm(shape[0] * shape[1], generator=generator)
    one, other, shared = order[:90000], order[90000:150000], order[89000:90000]
    indices = [
        SegmentedIndex.from_flat(flat.sort().values, shape)
        for flat in (one, other, torch.cat([other, shared]))
    ]
    with LiveBytes() as live:
        assert common(indices[0], indices[1]) == 0
    assert live.peak < 8 * 90000
    assert common(indices[0], indices[2]) == common(indices[2], indices[0]) == 1000
    assert common(indices[0], indices[0]) == 90000
