"""Losses of a model, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.quality.real.base import Base
from benchmarks.quality.real.texts import TokenRow

AT_ONCE = 16


@dataclass(frozen=True)
class Losses:
    """Of the rows of a set, in their order: nats of each, and whether every token that counts is
    the likeliest one."""

    nats: list[float]
    right: list[bool]


def padded(rows: Sequence[TokenRow], device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Ids [B, T], padded on the right, where causal attention never looks back at it; which of
    them count [B, T - first]; and `first`, from where on any does."""
    width, first = max(len(row.ids) for row in rows), min(row.start for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    counts = torch.zeros(len(rows), width, dtype=torch.bool)
    for at, row in enumerate(rows):
        ids[at, : len(row.ids)] = torch.tensor(row.ids)
        counts[at, row.start : len(row.ids)] = True
    return ids.to(device), counts[:, first:].to(device), first


def token_nats(model: Any, rows: Sequence[TokenRow], base: Base) -> tuple[Tensor, Tensor, Tensor]:
    """Nats of every token that counts [n], whether it is the likeliest [n], and its row [n]."""
    ids, counts, first = padded(rows, base.device)
    kept = ids.shape[1] - first + 1  # one more position, to predict from
    # `forward` of an adapter model says nothing of its own; that of the model inside does.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    takes = "logits_to_keep" in signature(inner.forward).parameters
    with base.autocast():
        logits = model(
            input_ids=ids, use_cache=False, **({"logits_to_keep": kept} if takes else {})
        ).logits
    logits, wanted = logits[:, -kept:-1][counts].float(), ids[:, first:][counts]
    nats = F.cross_entropy(logits, wanted, reduction="none")
    return nats, logits.argmax(-1) == wanted, counts.nonzero()[:, 0]


@torch.no_grad()
def losses(model: Any, rows: Sequence[TokenRow], base: Base) -> Losses:
    """Of a model in the mode it is in: in evaluation mode bitsandbytes' own layers repack their
    weights on a CPU, and in training mode nothing is dropped."""
    nats, right = [0.0] * len(rows), [True] * len(rows)
    order = sorted(range(len(rows)), key=lambda at: len(rows[at].ids))
    for start in range(0, len(order), AT_ONCE):
        batch = order[start : start + AT_ONCE]
        each, hits, row = token_nats(model, [rows[at] for at in batch], base)
        for n, at in enumerate(batch):
            mine = row == n
            nats[at] = float(each[mine].double().sum())
            right[at] = bool(hits[mine].all())
    return Losses(nats, right)
