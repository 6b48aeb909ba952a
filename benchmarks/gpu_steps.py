"""Training steps on a GPU: peaks, times, profile and plan, with and without a cap on memory.

A part of `gpu_proof`.
"""

from __future__ import annotations

import gc
import tempfile
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch

from benchmarks import card
from benchmarks.gpu_kernels import Rows
from benchmarks.gpu_profile import modelled_step, profiled, speed
from benchmarks.trainee import DENSITY, GIB, Scale, Trainee

CAPS = {"default": (7.3,), "int8_embeddings": (7.3,), "offloaded": (7.3, 5.7)}
PEAK_BARS = {"int8_embeddings": 6.3, "offloaded": 5.5}


def steps(scale: Scale, setting: str, trainee: Trainee) -> Rows:
    """Peaks and times, without and with a cap, and the plan."""
    rows: Rows = []
    for cap in (None, *(CAPS[setting] if scale.cuda else ())):
        rows += _under(scale, setting, trainee, cap)
    peak = max(trainee.peaks, default=None)
    if scale.cuda and setting != "offloaded":  # whose token ids go to the CPU
        trainee.optimizer.zero_grad()
        waits = trainee.waits()
        bar = {"bar": "nothing", "holds": waits == "nothing"}
        rows.append({"what": f"{setting}, the host waits for", "value": waits, **bar})
    if scale.cuda:
        modelled = modelled_step(scale, "leanlift") if setting == "default" else None
        rows += profiled(trainee, setting, modelled)
    return rows + [
        {"what": f"{setting}, {what}", **row} for what, row in _planned(scale, setting, peak)
    ]


def _under(scale: Scale, setting: str, trainee: Trainee, cap: float | None) -> Rows:
    """Some steps under a cap, in GiB; None: without one."""
    label = f"{setting}{'' if cap is None else f', cap {cap} GiB'}"
    trainee.seconds.clear()
    trainee.peaks.clear()
    release()  # what attaching has left in the allocator would count as reserved
    if scale.cuda:
        card.reset_peaks()
    reserved = 0
    try:
        with nullcontext() if cap is None else card.capped(cap):
            for _ in range(scale.steps):
                trainee.step()
                if scale.cuda:  # a step resets the peaks
                    reserved = max(reserved, card.reserved_peak())
    except torch.OutOfMemoryError as error:
        trainee.optimizer.zero_grad()
        return [{"what": f"{label}, runs", "value": str(error)[:80], "holds": False}]
    taken = median(trainee.seconds)
    rows: Rows = [{"what": f"{label}, step s", "value": round(taken, 4)}]
    rows += speed(scale, label, taken) if cap is None else []
    if not trainee.peaks:
        return rows
    peak, early = max(trainee.peaks), max(trainee.peaks[: scale.steps // 3])
    bar = PEAK_BARS.get(setting) if not scale.small else None
    held = {} if bar is None else {"bar": f"<= {bar}", "holds": peak <= bar * GIB}
    creep = {"bar": "<= 1", "holds": peak - early <= 2**20}
    return [
        *rows,
        {"what": f"{label}, allocated GiB", "value": round(peak / GIB, 3), **held},
        {"what": f"{label}, creep MiB", "value": round((peak - early) / 2**20, 2), **creep},
        {"what": f"{label}, reserved GiB", "value": round(reserved / GIB, 3)},
    ]


def by_torch(trainee: Trainee) -> Rows:
    """A step whose layers compute in plain torch; the optimizer stays as it is."""
    from leanlift.model import use_ops

    use_ops(trainee.model, "torch")
    done = len(trainee.seconds)
    for _ in range(3):
        trainee.step()
    use_ops(trainee.model, "auto")
    taken = round(median(trainee.seconds[done:]), 4)
    return [{"what": "default, layers in plain torch, step s", "value": taken}]


def _planned(scale: Scale, setting: str, peak: int | None) -> list[tuple[str, dict[str, Any]]]:
    try:
        from leanlift.plan import PlanSettings, plan_memory
    except ImportError as error:
        return [("plan", {"value": f"skipped: {error}"})]
    from benchmarks.peers import llama
    from leanlift import LiftConfig

    config = LiftConfig(
        density=DENSITY, values_dtype="bfloat16", quantize_embeddings=setting != "default"
    )
    cuda = scale.cuda
    least = setting == "offloaded" and cuda
    settings = PlanSettings(
        per_device_train_batch_size=1,
        max_length=scale.tokens,
        optim="sparse_adamw_8bit",
        optim_in_backward=setting != "default",
        activation_offloading=least,
        embedding_on_cpu=least,
        cuda=cuda,
    )
    with tempfile.TemporaryDirectory() as directory:
        llama(*scale.shape).save_pretrained(directory)
        planned = plan_memory(directory, config, settings).phases["train"]
    rows = [("planned GiB", {"value": round(planned / GIB, 3)})]
    if peak:
        rows.append(("planned / measured", {"value": round(planned / peak, 3)}))
    return rows


def release() -> None:
    """Let go of what nothing holds."""
    gc.collect()
    if card.present():
        card.release()
