"""Choosing the mask again from the current weights, layer by layer.

Survivors keep value and moments, leavers settle (their offset stays in the model), newcomers
start from their settled offset or zero, with a state that keeps their first steps small.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from leanlift.model.attach import lift_layers, lift_state
from leanlift.optim import follow_entries
from leanlift.selection import selection


@dataclass(frozen=True)
class RefreshReport:
    """One refresh.

    Attributes:
        churn: share of all entries that were replaced.
        settled: entries that are no longer trained but hold an offset, after the refresh.
        seconds: wall time.
        unconverged: targets whose selection did not settle.
    """

    churn: float
    settled: int
    seconds: float
    unconverged: tuple[str, ...]


@torch.no_grad()
def refresh_mask(model: nn.Module, optimizer: Optimizer | None = None) -> RefreshReport:
    """Select again from W_eff and move values and optimizer state along.

    Args:
        model: an attached model.
        optimizer: the one that trains it; its moments follow their entries.
    """
    state = lift_state(model)
    scorer = state.config.scorer()
    started = time.perf_counter()
    replaced = total = settled = 0
    unconverged = []
    for name, layer in lift_layers(model).items():
        chosen = selection(
            layer.effective, scorer, layer.index.count, name, state.config.selection_tile_bytes
        )
        if not chosen.converged:
            unconverged.append(name)
        change = layer.change_mask(chosen.flat)
        if optimizer is not None:
            follow_entries(optimizer, layer.values, change.source)
        replaced += int((change.source < 0).sum())
        total += layer.index.count
        settled += change.settled_flat.numel()
    state.refreshes += 1
    state.unconverged = unconverged
    return RefreshReport(
        churn=replaced / total,
        settled=settled,
        seconds=time.perf_counter() - started,
        unconverged=tuple(unconverged),
    )
