"""Which entries of a matrix to train.

    select(tiles, scorer, count) -> sorted flat int64 positions

`tiles` is a 2-D tensor or anything that can be read by rows; it is never held whole. Extra
memory: one tile, the scorer's factors, and O(count); `selection_nbytes` is the rule.

The same weights, scorer and count give the same mask, bit for bit on one machine, whatever the
tile size; `Random` gives the same on every machine. Ties go to the lower position.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from leanlift.errors import UserError
from leanlift.selection.blocks import BLOCK_ROWS, block_rows, read_blocks, tile_nbytes
from leanlift.selection.scorers import (
    Favoring,
    Gradient,
    Magnitude,
    Principal,
    Random,
    RowScores,
    Scorer,
)
from leanlift.selection.topk import StreamedTopK, kth_largest, topk_nbytes
from leanlift.tiles import (
    DEFAULT_TILE_BYTES,
    RangeTiles,
    RowTiles,
    ScaledTiles,
    as_tiles,
    is_stack,
    part_shape,
    parts_of,
    row_ranges,
)

__all__ = [
    "Favoring",
    "Gradient",
    "Magnitude",
    "Principal",
    "Random",
    "Scorer",
    "Selection",
    "StreamedTopK",
    "count_by_density",
    "count_by_rank",
    "scores_of",
    "select",
    "selection",
    "selection_nbytes",
]


@dataclass(frozen=True)
class Selection:
    """A mask, and what it was chosen by.

    Attributes:
        flat: sorted int64 positions [count].
        converged: whether the mask is the one right one: the approximation has converged, it is
            unique, and its smallest selected entry is more than a rounding error of the largest.
        scores: what the entries were ranked by; holds the scorer's factors.
    """

    flat: Tensor
    converged: bool
    scores: RowScores


def select(tiles: RowTiles | Tensor, scorer: Scorer, count: int) -> Tensor:
    """The `count` entries with the largest scores, as sorted flat int64 positions.

    A block-structured scorer takes whole b x b blocks: `count` is rounded down to a multiple
    of b².

    Raises:
        ValueError: count outside 0..m*n, a matrix with NaN or infinite entries, one whose entries
            cannot be ranked, or sides that blocks do not divide.
    """
    return selection(tiles, scorer, count).flat


@torch.no_grad()
def selection(
    tiles: RowTiles | Tensor,
    scorer: Scorer,
    count: int,
    name: str = "the matrix",
    tile_bytes: int = DEFAULT_TILE_BYTES,
) -> Selection:
    """As `select`, and says whether the mask is unique and converged.

    Args:
        tiles, scorer, count: as for `select`. In a stack, `count` entries of each of its matrices
            are selected, which know nothing of each other; `scores` are then those of the last.
        name: what to call the matrix in errors.
        tile_bytes: about how many bytes of rows are read at once; does not change the result.
    """
    tiles = as_tiles(tiles)
    if not is_stack(tiles):
        return _selection(tiles, scorer, count, name, tile_bytes)
    (m, n), area, converged = part_shape(tiles), scorer.block**2, True
    each = count // area * area
    flat = torch.empty(parts_of(tiles) * each, dtype=torch.int64, device=tiles.device)
    for e in range(parts_of(tiles)):
        part = RangeTiles(tiles, e * m, (e + 1) * m)
        one = _selection(part, scorer, count, f"{name}[{e}]", tile_bytes)
        flat[e * each : (e + 1) * each] = one.flat + e * m * n
        converged &= one.converged
    return Selection(flat, converged, one.scores)


def _selection(
    tiles: RowTiles, scorer: Scorer, count: int, name: str, tile_bytes: int
) -> Selection:
    """A selection from one matrix."""
    m, n = tiles.shape
    if not 0 <= count <= m * n:
        raise UserError(
            f"expected to select 0 to {m * n} entries of {name} ({m}x{n}), got {count}."
        )
    side = scorer.block
    if m % side or n % side:
        raise UserError(
            f"{name} is {m}x{n}, which blocks of {side}x{side} do not divide: use block=1."
        )
    tiles = _in_range(tiles, _largest(tiles, tile_bytes, name))
    scores = scorer.prepare(tiles, count, tile_bytes)
    floor = None if side > 1 else _floor(scores, (m, n), count)
    top = _top(scores, (m, n), count, side, tiles.device, floor)
    if not top.complete and floor is not None:  # the guess was too high
        top = _top(scores, (m, n), count, 1, tiles.device, None)
    flat = top.flat()
    if side > 1:
        flat, count = _entries_of(flat, n, side), count // side**2 * side**2
    smallest, largest = top.spread()
    told_apart = smallest >= scores.resolution * largest
    if flat.numel() != count:
        raise UserError(
            f"the selection of {name} gave {flat.numel()} entries instead of {count}: its weights "
            "differ too much in size to be ranked; leave it out with exclude_modules."
        )
    return Selection(flat, scores.converged and told_apart, scores)


def _top(
    scores: RowScores,
    shape: tuple[int, int],
    count: int,
    side: int,
    device: torch.device,
    floor: float | None,
) -> StreamedTopK:
    """The top-k over all scores, summed over side x side blocks."""
    m, n = shape
    area = side * side
    step = BLOCK_ROWS // side * side or side
    top = StreamedTopK(count // area, m * n // area, min(m, step) * n // area, device, floor)
    for start, stop in row_ranges(m, step):
        top.push(_unit_scores(scores, start, stop, n, side), start * n // area)
    return top


def _unit_scores(scores: RowScores, start: int, stop: int, n: int, side: int) -> Tensor:
    """Scores of the entries of rows `start:stop`, or of their side x side blocks: 1-D."""
    block = scores.scores(start, stop)
    if side > 1:
        block = block.view(-1, side, n // side, side).sum(dim=(1, 3))
    return block.reshape(-1)


@torch.no_grad()
def scores_of(scores: RowScores, units: Tensor, shape: tuple[int, int], block: int = 1) -> Tensor:
    """The scores of some entries, or of some b x b blocks, as a selection ranks them.

    Args:
        scores: `Selection.scores`.
        units: sorted int64 numbers, row-major, of entries or of blocks of side `block`.
        shape: (m, n) of the matrix.

    Returns:
        fp32, one score per unit.
    """
    m, n = shape
    area = block * block
    found = torch.empty(units.numel(), device=units.device)
    for start, stop in row_ranges(m, BLOCK_ROWS // block * block or block):
        first, last = start * n // area, stop * n // area
        a, b = torch.searchsorted(units, units.new_tensor([first, last])).tolist()
        if a < b:
            found[a:b] = _unit_scores(scores, start, stop, n, block)[units[a:b] - first]
    return found


GUESS_ENTRIES = 2**22
"""Below this many scores a guess at the threshold saves nothing."""


def _floor(scores: RowScores, shape: tuple[int, int], count: int) -> float | None:
    """A score that the k-th largest is very likely above, from rows spread over the matrix."""
    m, n = shape
    if m * n < GUESS_ENTRIES or not count:
        return None
    rows = 8
    places = range(0, m - rows + 1, max(rows, m // 32))
    sample = torch.cat([scores.scores(a, a + rows).reshape(-1) for a in places])
    wanted = min(sample.numel(), max(1, round(count * sample.numel() / (m * n))))
    return 0.8 * kth_largest(sample, wanted)


def selection_nbytes(
    scorer: Scorer,
    shape: tuple[int, int],
    count: int,
    tile_bytes: int = DEFAULT_TILE_BYTES,
    itemsize: int = 4,
) -> int:
    """Peak bytes of tensors that a selection creates, from shapes alone.

    Args:
        scorer, shape, count, tile_bytes: as for `selection`.
        itemsize: of the dtype in which the matrix's rows come.
    """
    m, n = shape
    area = scorer.block**2
    peak, kept, tiles = scorer.nbytes(shape)
    block = block_rows(m) * n
    tile = tile_nbytes(shape, itemsize, tile_bytes)
    tiles += tile < m * n * itemsize and itemsize == 4  # what was read last is still in use
    candidates = topk_nbytes(count // area, m * n // area, block // area)
    summing = 4 * block if scorer.block > 1 else 0
    scoring = kept + candidates + (4 + 4 + itemsize) * block + summing
    expanding = 32 * count if scorer.block > 1 else 0  # blocks to sorted entries
    return max(
        tiles * tile + peak, tile + (1 + itemsize) * block, scoring, kept + candidates + expanding
    )


ORDINARY = 2.0**24
"""The largest weight of a matrix lies between this and its inverse, or the matrix is scaled."""


def _largest(tiles: RowTiles, tile_bytes: int, name: str) -> float:
    """The largest magnitude in a matrix.

    Raises:
        UserError: entries that are NaN or infinite.
    """
    largest, bad = 0.0, 0
    for _, _, rows in read_blocks(tiles, tile_bytes, torch.float32):
        low, high = (float(bound) for bound in torch.aminmax(rows))
        if not (math.isfinite(low) and math.isfinite(high)):  # one NaN spoils both
            bad += int((~torch.isfinite(rows)).sum())
        largest = max(largest, -low, high)
    if bad:
        raise UserError(
            f"{name} has {bad} NaN or infinite weights of {tiles.shape[0] * tiles.shape[1]}: "
            "the checkpoint is damaged, load another one."
        )
    return largest


def _in_range(tiles: RowTiles, largest: float) -> RowTiles:
    """The matrix, or where its squares would leave the range of fp32, the matrix times a power of
    two: which entries are largest stays the same."""
    if largest == 0 or 1 / ORDINARY <= largest <= ORDINARY:
        return tiles
    return ScaledTiles(tiles, -math.frexp(largest)[1])


def _entries_of(blocks: Tensor, n: int, side: int) -> Tensor:
    """Sorted flat positions of the entries of these b x b blocks (numbered row-major)."""
    row, column = blocks // (n // side) * side, blocks % (n // side) * side
    inside = torch.arange(side, device=blocks.device)
    entry = inside.unsqueeze(1) * n + inside  # [b, b]
    flat = (row * n + column).view(-1, 1, 1) + entry
    return flat.view(-1).sort().values


def count_by_density(shape: tuple[int, int], density: float) -> int:
    """⌊density · m · n⌋."""
    return int(density * shape[0] * shape[1])


def count_by_rank(shape: tuple[int, int], rank_budget: int) -> int:
    """r · (m + n): the parameters of a rank-r LoRA on the same matrix."""
    return rank_budget * (shape[0] + shape[1])
