"""Choosing the mask again from the current weights, layer by layer.

Survivors keep value and moments, leavers retire (their offset stays in the model), newcomers
start from their retired offset or zero, with a state that keeps their first steps small. Two
settings keep the retired store small: a margin by which a newcomer must beat the entry whose
place it takes, and a bound at which newcomers that would need more room are held back.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from leanlift.config import LiftConfig
from leanlift.layers import LiftLinear
from leanlift.model.attach import selecting_nbytes
from leanlift.model.state import lift_layers, lift_state
from leanlift.model.stream_state import let_rest
from leanlift.optim import remap_entries
from leanlift.processes import of_the_first
from leanlift.selection import Favoring, scores_of, selection
from leanlift.sparse import BoundedMask, bounded_mask
from leanlift.tiles import RangeTiles, part_shape, parts_of

EXCHANGE_PER_ENTRY = 64
"""Bytes per entry while a mask is exchanged: sorted int64 positions of both masks and the store,
where each entry was, and both moments before and after. Where up to a seventh of the entries are
replaced, twice what refreshes do; a mask that is replaced whole takes up to 132."""


@dataclass(frozen=True)
class RefreshReport:
    """One refresh.

    Attributes:
        churn: share of all entries that were replaced.
        retired: entries that are no longer trained but hold an offset, after the refresh.
        retired_nbytes: bytes of the retired stores, index and offsets.
        held_back: newcomers that were not admitted, because a retired store was full.
        seconds: wall time.
        unconverged: targets whose selection did not converge.
    """

    churn: float
    retired: int
    retired_nbytes: int
    held_back: int
    seconds: float
    unconverged: tuple[str, ...]


@torch.no_grad()
def refresh_mask(
    model: nn.Module, optimizer: Optimizer | None = None, progress: bool = False
) -> RefreshReport:
    """Select again from W_eff and move values and optimizer state along.

    Args:
        model: an attached model.
        optimizer: the one that trains it; its moments follow their entries.
        progress: whether to show a bar over the layers.
    """
    state = lift_state(model)
    started = time.perf_counter()
    replaced = total = retired = retired_nbytes = held_back = 0
    unconverged = []
    layers = lift_layers(model)
    for name, layer in tqdm(layers.items(), "refreshing", unit="matrix", disable=not progress):
        total += layer.index.count
        if layer.is_fixed:
            continue
        layer.bring()
        mask, converged = _choose(layer, name, state.config)
        if not converged:
            unconverged.append(name)
        change = layer.change_mask(of_the_first(mask.flat))
        if optimizer is not None:
            remap_entries(optimizer, layer.values, change.source)
        replaced += int((change.source < 0).sum())
        retired += change.retired_count
        retired_nbytes += layer.retired_nbytes
        held_back += mask.held_back
    let_rest(model)
    state.refreshes += 1
    state.unconverged = unconverged
    return RefreshReport(
        churn=replaced / max(total, 1),
        retired=retired,
        retired_nbytes=retired_nbytes,
        held_back=held_back,
        seconds=time.perf_counter() - started,
        unconverged=tuple(unconverged),
    )


def _choose(layer: LiftLinear, name: str, config: LiftConfig) -> tuple[BoundedMask, bool]:
    """The layer's next mask, and whether its selection converged; of a stack, each matrix's."""
    parts, (m, n) = parts_of(layer.weight_tiles), part_shape(layer.weight_tiles)
    if parts == 1:
        return _choose_rows(layer, 0, m, name, config)
    chosen = [_choose_rows(layer, e * m, (e + 1) * m, f"{name}[{e}]", config) for e in range(parts)]
    flat = torch.cat([mask.flat + e * m * n for e, (mask, _) in enumerate(chosen)])
    held_back = sum(mask.held_back for mask, _ in chosen)
    return BoundedMask(flat, held_back), all(converged for _, converged in chosen)


def _choose_rows(
    layer: LiftLinear, start: int, stop: int, name: str, config: LiftConfig
) -> tuple[BoundedMask, bool]:
    """The next mask of rows `start:stop`, counted from the first of them, which trains as many
    entries as before."""
    scorer, learned = config.scorer(), layer.learned.rows(start, stop)
    index, rows = learned.active.index, RangeTiles(layer.effective, start, stop)
    if config.refresh_margin:
        scorer = Favoring(scorer, index, config.refresh_margin)
    chosen = selection(rows, scorer, index.count, name, config.selection_tile_bytes)
    bound = config.retired_bound(index.count)
    if bound is None:
        return BoundedMask(chosen.flat, 0), chosen.converged

    def unit_scores(units: Tensor) -> Tensor:
        return scores_of(chosen.scores, units, index.shape, scorer.block)

    mask = bounded_mask(learned, chosen.flat, bound, scorer.block, unit_scores)
    return mask, chosen.converged


def refresh_nbytes(
    config: LiftConfig,
    shapes: Mapping[str, tuple[int, int]],
    counts: Mapping[str, int],
    parts: Mapping[str, int] | None = None,
) -> int:
    """Peak of a refresh beyond what stays, from shapes alone: one matrix is selected from, in fp32,
    or exchanges its mask. The stored rows that a tile is made of, one tile more, are not counted.

    Args:
        config: what is trained.
        shapes, counts: of every target, and of its trained entries.
        parts: how many matrices a target is a stack of, of stacks.
    """
    exchange = EXCHANGE_PER_ENTRY * max((counts[name] for name in shapes), default=0)
    return max(selecting_nbytes(config, shapes, counts, 4, parts), exchange)
