"""Exact top-k over scores that arrive block by block.

Every selector ends here. The k largest of m*n scores are found in one pass with memory for
O(k + one block), and ties at the boundary go to the lower flat index, so a mask is one
well-defined set however the matrix is cut.
"""

from __future__ import annotations

import torch
from torch import Tensor


class StreamedTopK:
    """Keeps the `count` largest of a stream of non-negative scores with their flat positions.

    Push blocks in ascending order of position. Candidates are held in that order, so "the lower
    index wins" is "the earlier candidate wins"; once `count` candidates are held, a later score
    must be strictly larger than the smallest of them.

    Args:
        count: k.
        total: scores that will come, m*n; positions take 4 bytes where that is enough.
        block: the largest number of scores in one push.
        device: where the scores live.
        floor: a guess that the k-th largest score is above. A good one saves most of the work; a
            wrong one leaves the answer incomplete, never wrong.
    """

    def __init__(
        self,
        count: int,
        total: int,
        block: int,
        device: torch.device,
        floor: float | None = None,
    ) -> None:
        self.count = count
        capacity = topk_capacity(count, total, block)
        self._scores = torch.empty(capacity, device=device)
        self._flat = torch.empty(capacity, dtype=_position_dtype(total), device=device)
        self._held = 0
        self._threshold = floor

    @property
    def complete(self) -> bool:
        """Whether `count` candidates were found above the floor."""
        return self._held >= self.count

    def push(self, scores: Tensor, offset: int) -> None:
        """Offer 1-D scores of positions `offset, offset + 1, …`."""
        if self.count == 0:
            return
        if self._threshold is not None:
            keep = scores > self._threshold
        elif scores.numel() > self.count:
            keep = scores >= kth_largest(scores, self.count)
        else:
            keep = torch.ones_like(scores, dtype=torch.bool)
        flat = keep.nonzero().squeeze(1)
        if self._held + flat.numel() > self._scores.numel():
            self._compact()
        stop = self._held + flat.numel()
        self._scores[self._held : stop] = scores[flat]
        self._flat[self._held : stop] = flat.add_(offset)
        self._held = stop

    def flat(self) -> Tensor:
        """The positions found, ascending: int64 [count]."""
        self._compact()
        return self._flat[: self._held].long()

    def spread(self) -> tuple[float, float]:
        """The smallest and the largest score of what `flat` has returned."""
        held = self._scores[: self._held]
        return (float(held.min()), float(held.max())) if self._held else (0.0, 0.0)

    def _compact(self) -> None:
        """Cut what is held back to `count` candidates."""
        if self._held < self.count or not self.count:
            return
        scores, flat = self._scores[: self._held], self._flat[: self._held]
        self._threshold = kth_largest(scores, self.count)
        keep = scores > self._threshold
        ties = (scores == self._threshold).nonzero().squeeze(1)
        keep[ties[: self.count - int(keep.sum())]] = True
        self._scores[: self.count] = scores[keep]
        self._flat[: self.count] = flat[keep]
        self._held = self.count


def kth_largest(scores: Tensor, k: int) -> float:
    """The k-th largest of 1-D scores, as a Python float (exact)."""
    return float(torch.topk(scores, k, sorted=False).values.min())


def topk_capacity(count: int, total: int, block: int) -> int:
    """Candidates that are held at most: k, and room for what a block may bring."""
    return min(total, count + max(count // 2, block))


def topk_nbytes(count: int, total: int, block: int) -> int:
    """Peak bytes of a `StreamedTopK`: its candidates, what a pushed block takes (a mask, places,
    gathered scores) and the compaction that it may set off (values and places, two masks)."""
    capacity = topk_capacity(count, total, block)
    held = capacity * (4 + _position_dtype(total).itemsize)
    return held + max(12 * count + 2 * capacity + 9 * block, 13 * block)


def _position_dtype(total: int) -> torch.dtype:
    return torch.int32 if total < 2**31 else torch.int64
