"""Samples of a base's weights, by which an adapter knows it again.

Per tensor some positions and the cells that the weight has there (`cells`): spread over the
matrix, and, in what is trained, at entries of the first mask. Those are what the base's own
merge differs in; a twin that was fine-tuned by other means differs nearly everywhere.

As text a sample is the kind of its cells, a colon, and base64 of int64 positions, then fp32 lows,
then fp32 highs. A norm or an embedding is another one if a single cell disagrees, a matrix if more
than one in fifty does (of eight or more, one may: a tie between two codes can fall differently on
another device), a model if more than one in two hundred does.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass

import torch
from torch import Tensor

from leanlift.fingerprint.cells import KINDS, Cells

SPREAD = 16
"""Positions of a matrix that its shape alone gives."""

CHOSEN = 48
"""Positions of a matrix that the mask gives."""

ENDS = 256
"""Positions of the embedding and of a norm, at most."""

MOST = 1024
"""Positions that a sample may have; one from a file that anyone may have written."""

IN_ALL = 2**18
"""Positions of all matrices together, about: a model of very many gets fewer of each."""


@dataclass(frozen=True)
class Sample:
    """Cells at sorted, distinct positions `flat` int64 [s]."""

    flat: Tensor
    cells: Cells

    def encode(self) -> str:
        """The sample as text: its kind of cells, then positions and bounds in base 64."""
        largest = torch.finfo(torch.float32).max
        low, high = (x.clamp(-largest, largest).float() for x in (self.cells.low, self.cells.high))
        parts = (self.flat.cpu(), low, high)
        data = base64.b64encode(b"".join(part.numpy().tobytes() for part in parts)).decode()
        return f"{self.cells.kind}:{data}"

    def at(self, flat: Tensor) -> Sample:
        """The part of this sample at those positions `flat`."""
        inside = torch.isin(self.flat, flat)
        part = Cells(self.cells.low[inside], self.cells.high[inside], self.cells.kind)
        return Sample(self.flat[inside], part)


def decode(text: str, numel: int, finite: bool = True) -> Sample:
    """Back from `Sample.encode`.

    Args:
        text: which anyone may have written.
        numel: entries of the tensor that it is of.
        finite: whether it is of a base that has been looked through for NaN.

    Raises:
        ValueError: it is no sample of such a tensor.
    """
    if len(text) > 4 * MOST * 16 // 3 + 16:
        raise ValueError(f"expected at most {MOST} positions")
    kind, _, coded = text.partition(":")
    if kind not in KINDS:
        raise ValueError(f"expected one of {', '.join(KINDS)} and a colon")
    try:
        data = bytearray(base64.b64decode(coded, validate=True))
    except (binascii.Error, ValueError):
        raise ValueError("expected base64") from None
    count, rest = divmod(len(data), 16)
    if rest or not count:
        raise ValueError("expected 16 bytes a position")
    flat = torch.frombuffer(data, dtype=torch.int64, count=count).clone()
    low, high = torch.frombuffer(data, dtype=torch.float32, offset=8 * count).clone().view(2, -1)
    if int(flat[0]) < 0 or int(flat[-1]) >= numel or bool((flat[1:] <= flat[:-1]).any()):
        raise ValueError("expected sorted positions inside the tensor")
    if finite and not bool((torch.isfinite(low) & torch.isfinite(high) & (low <= high)).all()):
        raise ValueError("expected finite bounds in order")
    return Sample(flat, Cells(low.double(), high.double(), kind))


def spread(numel: int, count: int) -> Tensor:
    """At most `count` sorted positions of a tensor, over all of it; the first is always there."""
    step = max(1, int(numel * 0.6180339887)) | 1
    return (torch.arange(min(count, numel)) * step % numel).unique()


def positions(numel: int, mask: Tensor, targets: int) -> Tensor:
    """Where a trained matrix is sampled: sorted int64 [s].

    Args:
        numel: entries of the matrix.
        mask: sorted positions that it trains.
        targets: matrices that are sampled.
    """
    share = min(1.0, IN_ALL / (targets * (SPREAD + CHOSEN)))
    chosen = max(6, int(share * CHOSEN))
    wanted, last = min(chosen, mask.numel()), mask.numel() - 1
    at = torch.linspace(0, last, wanted, dtype=torch.float64).round().long()
    return torch.cat([spread(numel, max(2, int(share * SPREAD))), mask.cpu()[at]]).unique()


@dataclass
class Comparison:
    """Counts cells that disagree, tensor by tensor."""

    cells: int = 0
    wrong: int = 0

    def add(self, recorded: Sample, found: Cells, exact: bool = False) -> bool:
        """Whether a tensor is, by its cells, the recorded one.

        Args:
            recorded: the sample.
            found: cells of the tensor at the sample's positions.
            exact: whether it was never quantized, so that no cell may disagree.
        """
        agrees = recorded.cells.agree(found)
        wrong = int((~agrees).sum())
        self.cells += agrees.numel()
        self.wrong += wrong
        count = agrees.numel()
        return wrong <= (0 if exact or count < 8 else max(1, count // 50))

    @property
    def is_other(self) -> bool:
        """Whether too many disagree in all."""
        return self.wrong > max(2, self.cells // 200)
