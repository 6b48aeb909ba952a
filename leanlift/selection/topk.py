"""Exact top-k over scores that arrive tile by tile.

Every selector ends here. The k largest of m*n scores are found in one pass with memory for
O(k + one tile), and ties at the boundary go to the lower flat index, so a mask is one
well-defined set whatever the tile size.
"""

from __future__ import annotations

import torch
from torch import Tensor


class StreamedTopK:
    """Keeps the `count` largest of a stream of non-negative scores with their flat positions.

    Push tiles in ascending order of position. Candidates are held in that order, so "the lower
    index wins" is "the earlier candidate wins"; once `count` candidates are held, a later score
    must be strictly larger than the smallest of them.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._scores: list[Tensor] = []
        self._flat: list[Tensor] = []
        self._held = 0
        self._threshold: float | None = None

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
        self._scores.append(scores[flat])
        self._flat.append(flat + offset)
        self._held += flat.numel()
        if self._held >= 2 * self.count:
            self._compact()

    def flat(self) -> Tensor:
        """The positions found, ascending: int64 [count]."""
        self._compact()
        return self._flat[0] if self._flat else torch.empty(0, dtype=torch.int64)

    def _compact(self) -> None:
        if not self._flat:
            return
        scores, flat = torch.cat(self._scores), torch.cat(self._flat)
        if scores.numel() >= self.count:
            self._threshold = kth_largest(scores, self.count)
            keep = scores > self._threshold
            ties = (scores == self._threshold).nonzero().squeeze(1)
            keep[ties[: self.count - int(keep.sum())]] = True
            scores, flat = scores[keep], flat[keep]
        self._scores, self._flat, self._held = [scores], [flat], scores.numel()


def kth_largest(scores: Tensor, k: int) -> float:
    """The k-th largest of 1-D scores, as a Python float (exact)."""
    return float(torch.topk(scores, k, sorted=False).values.min())
