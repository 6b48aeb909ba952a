"""The one loop that every method goes through."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.domain import Domain
from benchmarks.quality.methods import Prepared
from leanlift.layers import LiftLinear
from leanlift.measure.live import LiveBytes
from leanlift.model import RefreshReport, refresh_mask
from leanlift.weights.places import weight_tensors
from leanlift.weights.quantized import is_quantized

EPS, MAX_NORM = 1e-6, 1.0
MEASURED = 2  # first steps, whose bytes are followed and whose time does not count


@dataclass(frozen=True)
class Schedule:
    """Of a fine-tuning run; the learning rate grows over the first `warm_up` of the steps."""

    steps: int
    batch: int
    warm_up: float = 0.1
    beta2: float = 0.95


@dataclass
class Trained:
    """What a run has measured.

    Attributes:
        parameters: that were trained.
        peak_bytes: of tensors; on a CPU held ones plus the live ones of the first steps.
        step_ms: mean wall time of a step, refreshes not counted.
        refreshes: one report for each.
    """

    parameters: int
    peak_bytes: int
    step_ms: float
    refreshes: list[RefreshReport] = field(default_factory=list)


def train(
    prepared: Prepared,
    domain: Domain,
    schedule: Schedule,
    lr: float,
    seed: int,
    device: torch.device,
) -> Trained:
    """Train with AdamW, warm-up and linear decay, in place."""
    model = prepared.model
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr, (0.9, schedule.beta2), EPS, weight_decay=0.0)
    warm_up = max(1, round(schedule.warm_up * schedule.steps))

    def factor(step: int) -> float:
        rest = (schedule.steps - step) / (schedule.steps - warm_up)
        return min((step + 1) / warm_up, rest, 1.0)

    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    batches = domain.train.batches(schedule.batch, seed)

    def step() -> None:
        batch = {key: tensor.to(device) for key, tensor in next(batches).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        decay.step()

    refreshes, seconds = [], 0.0
    peak = _peak_of(model, step, min(MEASURED, schedule.steps), device)
    for number in range(MEASURED + 1, schedule.steps + 1):
        started = time.perf_counter()
        step()
        seconds += time.perf_counter() - started
        if prepared.refresh and number % prepared.refresh == 0 and number < schedule.steps:
            refreshes.append(refresh_mask(model, optimizer))
    return Trained(
        parameters=sum(p.numel() for p in parameters),
        peak_bytes=peak,
        step_ms=1000 * seconds / max(1, schedule.steps - MEASURED),
        refreshes=refreshes,
    )


def _peak_of(model: nn.Module, step: Any, count: int, device: torch.device) -> int:
    """Run the first steps and return the peak of tensor bytes in them."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(count):
            step()
        return torch.cuda.max_memory_allocated(device)
    held = held_bytes(model)
    with LiveBytes() as live:
        for _ in range(count):
            step()
    return held + live.peak


def held_bytes(model: nn.Module) -> int:
    """Bytes of everything a model holds, with quantized weights, their scales and indices."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    index = 0
    for module in model.modules():
        if is_quantized(module):
            tensors += weight_tensors(module)
        if isinstance(module, LiftLinear):
            tensors += weight_tensors(module.base)
            index += module.index.nbytes
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return index + sum(storages.values())
