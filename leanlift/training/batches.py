"""Which batches a run will have: what a step needs is decided by the largest.

The lengths of tokenized rows are known before the base is loaded; which rows meet in a batch is the
sampler's to say. So a run is planned for the worst batch that can occur: the longest row, padded as
the collator pads, beside as many others; and the most trained tokens that so many rows have. What a
run then measures is compared with a plan for the largest batch that did occur, so that the
difference is the planner's and not chance's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor

from leanlift.data.dataset import TokenRows
from leanlift.data.images import ImageRows
from leanlift.data.lengths import skips_preparation
from leanlift.data.tokens import IGNORED
from leanlift.plan import Batch, largest_batch
from leanlift.plan.seen import Seen
from leanlift.training.loss import TRAINED

FLAT = ("bfd", "bfd_split")
"""Packing strategies whose batches TRL lays out without padding."""


@dataclass(frozen=True)
class Batches:
    """The worst micro-batches of a run; None: not known, or no evaluation. And whether rows have
    images."""

    train: Batch | None = None
    eval: Batch | None = None
    images: bool = False


def worst_batches(rows: Any, eval_rows: Any, sft: Any) -> Batches:
    """Of the rows that `RowsForTraining` has made.

    Args:
        rows, eval_rows: `TokenRows`, or a stream or dataset whose lengths nobody has looked at.
        sft: an `SFTConfig`.
    """
    eval_packing = sft.packing if sft.eval_packing is None else sft.eval_packing
    return Batches(
        worst_batch(rows, sft.per_device_train_batch_size, sft, sft.packing),
        worst_batch(eval_rows, sft.per_device_eval_batch_size, sft, eval_packing),
        isinstance(rows, ImageRows),
    )


def worst_batch(rows: Any, size: int, sft: Any, packing: bool) -> Batch | None:
    """The worst batch of `size` rows that can occur; None where lengths are not known: packs are
    as long as `max_length` says."""
    if isinstance(rows, ImageRows):  # as long as the longest that were looked at
        seen = Seen.of(rows.fullest)
        return Batch(min(size, len(rows.data)), rows.longest, None, padded=size > 1, seen=seen)
    if packing or getattr(sft, "padding_free", False) or not isinstance(rows, TokenRows):
        return None
    if skips_preparation(sft):
        return None
    lengths, trained = lengths_of(rows.data)
    size = min(size, len(lengths))
    longest, multiple = int(lengths.max()), sft.pad_to_multiple_of or 1
    tokens = -(-longest // multiple) * multiple
    most = int(np.partition(trained, -size)[-size:].sum())
    padded = tokens > longest or (size > 1 and int(lengths.min()) < longest)
    return Batch(size, tokens, most, padded)


def largest_allowed(size: int, sft: Any, packing: bool) -> Batch:
    """The largest batch of rows that nobody has looked at, by the settings alone. Packs that are
    filled from whole rows go one after the other into a single row, with a mask between them."""
    found = largest_batch(size, sft.max_length)
    if getattr(sft, "padding_free", False) or (packing and sft.packing_strategy in FLAT):
        return Batch(1, size * found.tokens, None, padded=True)
    return replace(found, padded=False) if packing else found


def lengths_of(data: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and trained tokens, of each row of tokenized examples."""
    table = data.with_format("arrow")[:]
    lengths, trained = [], []
    for ids, labels in zip(
        table.column("input_ids").chunks, table.column("labels").chunks, strict=True
    ):
        lengths.append(np.diff(ids.offsets.to_numpy()))
        ends = labels.offsets.to_numpy()
        counted = labels.values.to_numpy() != IGNORED
        before = np.concatenate([[0], np.cumsum(counted)])
        firsts = np.append(counted, False)[ends[:-1]] & (np.diff(ends) > 0)  # nothing predicts them
        trained.append(before[ends[1:]] - before[ends[:-1]] - firsts)
    return np.concatenate(lengths), np.concatenate(trained)


class LargestBatch:
    """The largest micro-batch of each number of steps, as training goes over them."""

    def __init__(self) -> None:
        self._first: int | None = None
        self._records: list[tuple[int, Batch]] = []

    def see(self, inputs: Mapping[str, Any], step: int) -> None:
        """Note a batch of the step after `step`. Its sizes are known on the host; whether it needs
        a mask is asked of a CPU alone, and taken for granted on a GPU of several rows, and of
        packed ones. Of batches of one size the mask of one counts with the trained tokens of
        another: which of them takes more is the model's to say."""
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            return
        self._first = step if self._first is None else self._first
        trained, mask = inputs.get(TRAINED), inputs.get("attention_mask")
        rows, tokens = ids.shape
        on_cpu, places = ids.device.type == "cpu", inputs.get("position_ids")
        if places is not None:  # several rows one after the other, with a mask between
            padded = not on_cpu or int((places == 0).sum()) > rows
        else:
            padded = mask is not None and (not bool(mask.all()) if on_cpu else rows > 1)
        seen = Seen.of({key: held for key, held in inputs.items() if key != TRAINED})
        found = Batch(rows, tokens, None if trained is None else trained.numel(), padded, seen)
        last = self._records[-1][1] if self._records else None
        if last is not None and replace(found, trained=last.trained, padded=last.padded) == last:
            most = max(filter(None, (found.trained, last.trained)), default=None)
            found = replace(found, trained=most, padded=found.padded or last.padded)
        if last is None or size_of(found) > size_of(last):
            self._records.append((step - self._first, found))

    def within(self, steps: int | None = None) -> Batch | None:
        """The largest of the first so many steps of this process, or of all; None: there was
        none."""
        found = [batch for step, batch in self._records if steps is None or step < steps]
        return found[-1] if found else None


def size_of(batch: Batch) -> tuple[int, int, int, bool]:
    """What batches are ordered by."""
    pixels = 0 if batch.seen is None else batch.seen.nbytes
    return pixels, batch.rows * batch.tokens, batch.trained or 0, batch.padded
