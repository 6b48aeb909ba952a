"""Training steps on a GPU: peaks, times and plan of ours, PEFT's QLoRA and SHiRA beside them.

A part of `gpu_proof`.
"""

from __future__ import annotations

import gc
import tempfile
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch

from benchmarks.gpu_kernels import Rows
from benchmarks.gpu_profile import profiled
from benchmarks.trainee import GIB, RANK, Scale, Trainee, base, capped

CAPS = {"default": (7.3,), "int8_embeddings": (7.3,), "offloaded": (7.3, 5.7)}
PEAK_BARS = {"int8_embeddings": 6.3, "offloaded": 5.5}


def steps(scale: Scale, setting: str, trainee: Trainee) -> Rows:
    """Peaks and times, without and with a cap, and the plan."""
    rows: Rows = []
    for cap in (None, *(CAPS[setting] if scale.device.type == "cuda" else ())):
        label = f"{setting}{'' if cap is None else f', cap {cap} GiB'}"
        trainee.seconds.clear()
        trainee.peaks.clear()
        release()  # what attaching has left in the allocator would count as reserved
        if scale.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        reserved = 0
        try:
            with capped(scale, cap):
                for _ in range(scale.steps):
                    trainee.step()
                    if scale.device.type == "cuda":  # a step resets the peaks
                        reserved = max(reserved, torch.cuda.max_memory_reserved())
        except torch.OutOfMemoryError as error:
            rows.append({"what": f"{label}, runs", "value": str(error)[:80], "holds": False})
            trainee.optimizer.zero_grad()
            continue
        rows.append({"what": f"{label}, step s", "value": round(median(trainee.seconds), 4)})
        if trainee.peaks:
            peak, early = max(trainee.peaks), max(trainee.peaks[: scale.steps // 3])
            bar = PEAK_BARS.get(setting) if not scale.small else None
            held = {} if bar is None else {"bar": f"<= {bar}", "holds": peak <= bar * GIB}
            rows += [
                {"what": f"{label}, allocated GiB", "value": round(peak / GIB, 3), **held},
                {
                    "what": f"{label}, creep MiB",
                    "value": round((peak - early) / 2**20, 2),
                    "bar": "<= 1",
                    "holds": peak - early <= 2**20,
                },
                {
                    "what": f"{label}, reserved GiB",
                    "value": round(reserved / GIB, 3),
                },
            ]
    peak = max(trainee.peaks, default=None)
    if scale.device.type == "cuda" and setting != "offloaded":  # whose token ids go to the CPU
        trainee.optimizer.zero_grad()
        waits = trainee.waits()
        bar = {"bar": "nothing", "holds": waits == "nothing"}
        rows.append({"what": f"{setting}, the host waits for", "value": waits, **bar})
    if scale.device.type == "cuda":
        rows += profiled(trainee, setting)
        trainee.optimizer.zero_grad()
    return rows + [
        {"what": f"{setting}, {what}", **row} for what, row in _planned(scale, setting, peak)
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
        density=0.05, values_dtype="bfloat16", quantize_embeddings=setting != "default"
    )
    cuda = scale.device.type == "cuda"
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


def peers(scale: Scale, ours: Trainee) -> Rows:
    """PEFT's QLoRA and SHiRA beside us, in turn."""
    import bitsandbytes as bnb

    from benchmarks.peers import entries, lora, shira, stock_loss, trained

    widths = sum(sum(m.weight_tiles.shape) for m in _layers(ours.model))
    rank = max(1, round(entries(ours.model) / widths))
    cuda = scale.device.type == "cuda"

    def built(model: Any) -> tuple[Any, Any, Any, Any]:
        kind = (
            bnb.optim.AdamW8bit if cuda else torch.optim.AdamW
        )  # paged state would not be counted
        model.enable_input_require_grads()
        return model.train(), stock_loss, kind(trained(model), lr=1e-4), nullcontext

    makers = {
        f"QLoRA r={RANK}": lambda: built(lora(base(scale), RANK)),
        f"SHiRA r={rank}": lambda: built(shira(base(scale), rank)),
    }
    rows: Rows = []
    for name, make in makers.items():
        try:
            theirs = Trainee(scale, make)
            ours.seconds.clear()
            ours.peaks.clear()
            for _ in range(max(3, scale.steps // 3)):
                ours.step()
                theirs.step()
        except Exception as error:  # a peer that cannot run here is a row
            rows.append({"what": name, "value": f"skipped: {type(error).__name__} {error}"[:120]})
            continue
        time = median(ours.seconds) / median(theirs.seconds)
        bar = 1.25 if name.startswith("QLoRA") else 1 / 1.5
        held = {} if scale.small else {"bar": f"<= {bar:.3f}", "holds": time <= bar}
        rows.append({"what": f"{name}, step s", "value": round(median(theirs.seconds), 4)})
        rows.append({"what": f"leanlift / {name}, step", "value": round(time, 3), **held})
        if theirs.peaks:
            peak = max(ours.peaks) / max(theirs.peaks)
            held = {"bar": "<= 0.6", "holds": peak <= 0.6} if name.startswith("SHiRA") else {}
            gib = round(max(theirs.peaks) / GIB, 3)
            rows.append({"what": f"{name}, allocated GiB", "value": gib})
            rows += profiled(theirs, name)
            rows.append({"what": f"leanlift / {name}, peak", "value": round(peak, 3), **held})
        del theirs
        release()
    return rows


def _layers(model: Any) -> list[Any]:
    from leanlift.model import lift_layers

    return list(lift_layers(model).values())


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
