"""Where a step's time goes on a GPU, by class of kernel, and how long the host takes for it.

A part of `gpu_proof`.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.trainee import Trainee

Rows = list[dict[str, Any]]

CLASSES = {
    "dequantize and patch": ("effective_rows", "dequantize", "kDequantize"),
    "gather": ("gather_kernel",),
    "optimizer": ("adamw_kernel", "Optimizer", "optimizer"),
    "attention": ("flash", "sdpa", "fmha", "attention"),
    "products": ("nvjet", "gemm", "cutlass", "cublas", "matmul"),
    "copies": ("Memcpy", "Memset", "copy"),
    "elementwise and reductions": ("elementwise", "reduce", "Cat", "silu", "softmax"),
}


def profiled(trainee: Trainee, name: str) -> Rows:
    """Milliseconds of one step: kernels by class, and the host's alone."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    started = time.perf_counter()
    trainee.once()
    host = time.perf_counter() - started
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        trainee.once()
        torch.cuda.synchronize()
    spent: dict[str, float] = {}
    launches = 0
    for event in profiler.key_averages():
        kernel = (
            event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
        )
        if kernel:
            kind = _class_of(event.key)
            spent[kind] = spent.get(kind, 0.0) + event.self_device_time_total / 1e3
            launches += event.count
    rows: Rows = [
        {"what": f"{name}, host ms", "value": round(1e3 * host, 1)},
        {"what": f"{name}, kernels ms", "value": round(sum(spent.values()), 1)},
        {"what": f"{name}, kernels", "value": launches},
    ]
    for kind in sorted(spent, key=lambda kind: -spent[kind]):
        rows.append({"what": f"{name}, {kind}, ms", "value": round(spent[kind], 2)})
    return rows


def _class_of(kernel: str) -> str:
    for kind, words in CLASSES.items():
        if any(word in kernel for word in words):
            return kind
    return "other"
