"""What a step takes the host, apart from any computing: leanlift's layers beside QLoRA's.

    python -m benchmarks.host_time [--profile]

A Llama of 32 blocks that are 64 wide, over NF4, 4 tokens, activation checkpointing, one thread of a
CPU: there is next to nothing to compute, so a forward and a backward pass take as long as Python,
torch's dispatcher and autograd do. leanlift goes the way that it goes on a GPU, with Triton's
launches left out (some tens of microseconds each, in both products' stead); bitsandbytes' and
torch's kernels run, on a few numbers. Steps are taken in turn in one process; medians of CPU time.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.common import write_rows
from benchmarks.peers import lift, llama, lora, nf4_llama, stock_loss, tiled_loss
from leanlift import LiftConfig
from leanlift.model import lift_state
from leanlift.ops import triton_rows

HIDDEN, BLOCKS, TOKENS, RANK, REPEATS = 64, 32, 4, 4, 15
Step = Callable[[], None]


class NoLaunch:
    """A kernel that is asked for, and does nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **constants: None


def step_of(name: str) -> Step:
    """A forward and a backward pass of a way to train."""
    model = nf4_llama(llama(HIDDEN, BLOCKS, 256), torch.device("cpu"), torch.float32)
    ids = torch.randint(0, 256, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    loss = stock_loss
    if name == "leanlift":
        model = lift(model, LiftConfig(density=0.05, selector="random"))
        workspace = lift_state(model).workspace
        workspace.use("triton")
        workspace.ops, workspace.stands_for = triton_rows.TritonOps(), "cuda"
        workspace.scratch.take(HIDDEN * 4, HIDDEN, torch.float32, torch.device("cpu")).zero_()
        loss = tiled_loss
    else:
        model = lora(model, RANK)
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()

    def step() -> None:
        with (
            patch.object(triton_rows, "effective_rows_kernel", NoLaunch()),
            patch.object(triton_rows, "gather_kernel", NoLaunch()),
        ):
            loss(model, ids).backward()
        model.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", action="store_true", help="where leanlift's step goes")
    profile = parser.parse_args().profile
    torch.set_num_threads(1)
    torch.manual_seed(0)
    steps = {name: step_of(name) for name in ("leanlift", "PEFT QLoRA")}
    for step in steps.values():
        step()
    if profile:
        profiler = cProfile.Profile()
        profiler.runcall(steps["leanlift"])
        pstats.Stats(profiler).sort_stats("tottime").print_stats(45)
        return
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(REPEATS):
        for name, step in steps.items():
            started = time.process_time()
            step()
            times[name].append(time.process_time() - started)
    ours = median(times["leanlift"])
    rows = [
        {
            "way": name,
            "blocks": BLOCKS,
            "median ms": round(1e3 * median(found), 1),
            "least ms": round(1e3 * min(found), 1),
            "leanlift / this": round(ours / median(found), 3),
        }
        for name, found in times.items()
    ]
    for row in rows:
        print(row)
    print(f"Wrote {write_rows('host_time', rows)}")


if __name__ == "__main__":
    main()
