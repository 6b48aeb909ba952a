"""Step time and state size of SparseAdamW beside torch's and bitsandbytes' AdamW.

    python -m benchmarks.optimizer [--device cuda] [--repeats 9]

One vector of 2,254,438 values (5 % of 4096 × 11008), and eight of them. All optimizers step in
turn in one process, so that a slow moment of the machine meets them all; times are medians.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn

from benchmarks.common import timed, write_rows
from leanlift.optim import SparseAdamW, state_nbytes

COUNT = 2_254_438
OPTIONS: dict[str, Any] = {"lr": 2e-4, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.0}
Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
VARIANTS: dict[str, tuple[torch.dtype, Build]] = {
    "torch AdamW, foreach": (
        torch.float32,
        lambda p: torch.optim.AdamW(p, foreach=True, **OPTIONS),
    ),
    "torch AdamW, fused": (torch.float32, lambda p: torch.optim.AdamW(p, fused=True, **OPTIONS)),
    "bitsandbytes AdamW8bit": (torch.float32, lambda p: bnb.optim.AdamW8bit(p, **OPTIONS)),
    "SparseAdamW fp32": (torch.float32, lambda p: SparseAdamW(p, **OPTIONS)),
    "SparseAdamW 8bit": (torch.float32, lambda p: SparseAdamW(p, moments="8bit", **OPTIONS)),
    "SparseAdamW fp32, bf16 values": (torch.bfloat16, lambda p: SparseAdamW(p, **OPTIONS)),
    "SparseAdamW 8bit, bf16 values": (
        torch.bfloat16,
        lambda p: SparseAdamW(p, moments="8bit", **OPTIONS),
    ),
}


def build(name: str, vectors: int, device: str) -> torch.optim.Optimizer | None:
    """The optimizer after its first step, or None where this machine has no kernel for it."""
    dtype, make = VARIANTS[name]
    parameters = [
        nn.Parameter(torch.zeros(COUNT, device=device, dtype=dtype)) for _ in range(vectors)
    ]
    for parameter in parameters:
        parameter.grad = torch.randn(COUNT, device=device).to(dtype)
    try:
        optimizer = make(parameters)
        optimizer.step()
    except (RuntimeError, NotImplementedError) as error:
        print(f"{name}: skipped, {error}")
        return None
    return optimizer


def measure(vectors: int, device: str, repeats: int) -> list[dict[str, Any]]:
    built = {name: build(name, vectors, device) for name in VARIANTS}
    optimizers = {name: optimizer for name, optimizer in built.items() if optimizer is not None}
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(repeats):
        for name, optimizer in optimizers.items():
            seconds[name].append(timed(optimizer.step)[1])
    reference = median(seconds["torch AdamW, foreach"])
    return [
        {
            "optimizer": name,
            "vectors": vectors,
            "entries": COUNT,
            "median ms": round(1e3 * median(seconds[name]), 2),
            "least ms": round(1e3 * min(seconds[name]), 2),
            "ratio to foreach": round(median(seconds[name]) / reference, 2),
            "state bytes per entry": round(state_nbytes(optimizer) / (vectors * COUNT), 4),
        }
        for name, optimizer in optimizers.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for vectors in (1, 8):
        rows += measure(vectors, arguments.device, arguments.repeats)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    print(f"Wrote {write_rows('optimizer', rows)}")


if __name__ == "__main__":
    main()
