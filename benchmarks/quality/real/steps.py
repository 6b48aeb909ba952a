"""The loop that every method goes through."""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.quality.real.base import Base
from benchmarks.quality.real.measure import token_nats
from benchmarks.quality.real.methods import Prepared
from benchmarks.quality.real.texts import TokenRow
from leanlift.model import refresh_mask

BETAS, EPS, MAX_NORM = (0.9, 0.95), 1e-6, 1.0


@dataclass(frozen=True)
class Schedule:
    """Of a run; the learning rate grows over the first `warm_up` of the steps, then falls to 0."""

    steps: int = 32
    batch: int = 8
    warm_up: float = 0.1


@dataclass(frozen=True)
class Trained:
    """Parameters that were trained, milliseconds a step, and whether all losses were finite."""

    parameters: int
    step_ms: float
    finite: bool


def order(rows: int, schedule: Schedule, seed: int) -> list[list[int]]:
    """Which rows each step sees: a seed gives one order, and no row comes twice before all have."""
    wanted = schedule.steps * schedule.batch
    chance, places = random.Random(seed), []
    while len(places) < wanted:
        places += chance.sample(range(rows), rows)
    return [places[at : at + schedule.batch] for at in range(0, wanted, schedule.batch)]


def train(
    prepared: Prepared,
    rows: list[TokenRow],
    base: Base,
    schedule: Schedule,
    lr: float,
    seed: int,
) -> Trained:
    """Train in place, with AdamW, clipping and linear decay; ends where a loss is not finite."""
    model = prepared.model
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p], "lr": lr * prepared.lr_factors.get(name, 1.0)} for name, p in named.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr, BETAS, EPS, weight_decay=0.0)
    warm_up = max(1, round(schedule.warm_up * schedule.steps))

    def factor(step: int) -> float:
        rest = (schedule.steps - step) / max(1, schedule.steps - warm_up)
        return min((step + 1) / warm_up, rest, 1.0)

    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    started, finite = time.perf_counter(), True
    for number, places in enumerate(order(len(rows), schedule, seed), start=1):
        finite = _step(model, [rows[at] for at in places], base)
        if not finite:
            break
        torch.nn.utils.clip_grad_norm_(list(named.values()), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        if prepared.refresh and number % prepared.refresh == 0 and number < schedule.steps:
            refresh_mask(model, optimizer)
    took = 1000 * (time.perf_counter() - started) / schedule.steps
    return Trained(sum(p.numel() for p in named.values()), took, finite)


def _step(model: Any, rows: list[TokenRow], base: Base) -> bool:
    loss = token_nats(model, rows, base)[0].mean()
    if not math.isfinite(loss.item()):
        return False
    loss.backward()
    return True
