"""Keeping the retired store within a bound, by admitting fewer newcomers.

Every entry that leaves the mask with an offset takes a place in the retired store; every newcomer
that returns from it frees one. Where a new mask would need more places than there are, the best
newcomers take the places of the weakest leavers, pair by pair, for as long as the store keeps its
bound; the other leavers stay active and the other newcomers are held back. Nothing is pushed out.

A unit is what a selection takes whole: an entry, or a b x b block. Units are numbered row-major.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from leanlift.sparse.index import index_nbytes
from leanlift.sparse.offsets import LayerOffsets, find_positions


@dataclass(frozen=True)
class BoundedMask:
    """flat: the positions to make active, sorted int64 [k]. held_back: newcomers not admitted."""

    flat: Tensor
    held_back: int


def bounded_mask(
    learned: LayerOffsets,
    new_flat: Tensor,
    bound: int,
    block: int,
    unit_scores: Callable[[Tensor], Tensor],
) -> BoundedMask:
    """`new_flat`, or as much of it as keeps at most `bound` entries retired.

    Args:
        learned: the active entries [k] of an m x n matrix, and those that are retired.
        new_flat: the entries that were selected, sorted, distinct int64 [k].
        bound: entries that may be retired afterwards. A store that is over it already (an older
            run's, without a bound) may not grow.
        block: b, the side of a unit; both masks are made of whole units.
        unit_scores: the scores that the selection went by, fp32 [u], of sorted units [u]. Asked
            only where the bound is reached.
    """
    old_flat, columns = learned.active.index.to_flat(), learned.active.index.shape[1]
    entering = new_flat[find_positions(old_flat, new_flat) < 0]
    left = find_positions(new_flat, old_flat) < 0
    leaving, settling = old_flat[left], learned.active.values[left] != 0
    returning, retired = torch.zeros_like(entering, dtype=torch.bool), 0
    if learned.retired is not None:
        returning = find_positions(learned.retired.index.to_flat(), entering) >= 0
        retired = learned.retired.count
    bound = max(bound, retired)
    if retired + int(settling.sum()) - int(returning.sum()) <= bound:
        return BoundedMask(new_flat, 0)
    came = _Units(entering, returning, columns, block)
    went = _Units(leaving, settling, columns, block)
    best, weakest = rank_units(unit_scores(came.units), unit_scores(went.units))
    after = retired + torch.cumsum(went.weights[weakest] - came.weights[best], 0)
    fits = (after <= bound).nonzero()
    pairs = int(fits[-1]) + 1 if fits.numel() else 0
    admitted, stays = came.entries(best[:pairs]), went.entries(weakest[pairs:])
    flat = torch.cat([old_flat[~left], leaving[stays], entering[admitted]]).sort().values
    return BoundedMask(flat, entering.numel() - int(admitted.sum()))


def rank_units(entering: Tensor, leaving: Tensor) -> tuple[Tensor, Tensor]:
    """The order in which units change places: places of the best newcomers first, and of the
    weakest leavers first.

    Args:
        entering, leaving: fp32 scores [u] in order of position. Among equals the lower position
            is the better one, as in a selection.
    """
    best = torch.argsort(entering, descending=True, stable=True)
    weakest = torch.argsort(leaving, descending=True, stable=True).flip(0)
    return best, weakest


def retired_nbytes(shape: tuple[int, int], bound: int, itemsize: int = 4) -> int:
    """Bytes of a retired store with `bound` entries of `itemsize` bytes: index and offsets."""
    return index_nbytes(shape, bound) + itemsize * bound if bound else 0


class _Units:
    """The units that entries belong to, and how many marked entries each has."""

    def __init__(self, flat: Tensor, marked: Tensor, columns: int, block: int) -> None:
        row, column = flat // columns // block, flat % columns // block
        self.units, self._unit = torch.unique(
            row * (columns // block) + column, return_inverse=True
        )
        self.weights = torch.zeros_like(self.units).index_add_(0, self._unit, marked.long())

    def entries(self, chosen: Tensor) -> Tensor:
        """Which entries lie in the chosen units (places in `units`), bool."""
        mask = torch.zeros(self.units.numel(), dtype=torch.bool, device=self.units.device)
        mask[chosen] = True
        return mask[self._unit]
