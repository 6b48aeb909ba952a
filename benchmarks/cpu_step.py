"""A training step on a CPU beside PEFT's SHiRA and LoRA, over NF4, at equal trained entries.

    python -m benchmarks.cpu_step [--hidden 2048] [--layers 10] [--tokens 128] [--repeats 5]

A Llama of about 600 M parameters over NF4, computed in bf16 and again in fp32, no checkpointing,
one thread: forward, backward and torch's AdamW, r (m + n) entries of every Linear with r = 68. In
bf16 leanlift's offsets are bf16, as the command has them, with SparseAdamW and fp32 moments; PEFT's
adapters are bf16 too, as TRL trains them. The three step in turn in one process; times are medians
of the process's CPU time, which with one thread is the time of the step and which other work on the
machine stretches less than the clock's. The peak is of live tensor bytes in the last step, on top
of weights, trained entries and optimizer state, of which leanlift has no more bytes than the
others; leanlift's scratch, which stays, is counted in its peak. A step of few tokens goes before.

Where a CPU has no products in 16 bits (`own 16-bit products`), torch multiplies by loops, which are
slow backward (`cpu_product`). PEFT's layers, and the stock loss, take minutes for that: they step
once in bf16 there. leanlift multiplies in fp32. Who has such a CPU trains a LoRA in fp32, so that
leanlift's step in bf16 is to be compared with PEFT's in fp32.

bitsandbytes' own Linears stay in training mode: in eval mode their CPU forward repacks the weight.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from benchmarks.common import write_rows
from benchmarks.peers import (
    entries,
    lift,
    llama,
    lora,
    nf4_llama,
    shira,
    stock_loss,
    tiled_loss,
    trained,
)
from leanlift import LiftConfig
from leanlift.layers.cpu_product import has_products
from leanlift.measure import LiveBytes
from leanlift.model import lift_state
from leanlift.optim import SparseAdamW

RANK = 68
FEW = 8
"""Tokens of the step that makes the optimizer's state."""
MIB = 2**20


@dataclass
class Peer:
    """One way to train, ready to step; `stays` is what its step keeps beside the weights."""

    model: Any
    loss: Callable[[Any, torch.Tensor], torch.Tensor]
    optimizer: torch.optim.Optimizer
    ids: torch.Tensor
    stays: int = 0

    def step(self, tokens: int | None = None) -> None:
        self.loss(self.model, self.ids[:, :tokens]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def build(name: str, hidden: int, layers: int, tokens: int, dtype: torch.dtype) -> Peer:
    model = nf4_llama(llama(hidden, layers), torch.device("cpu"), dtype)
    ids = torch.randint(0, 32000, (1, tokens), generator=torch.Generator().manual_seed(0))
    loss = stock_loss
    if name == "leanlift":
        # the mask does not change what a step costs; a random one is quickly made
        values = str(dtype).removeprefix("torch.")
        model = lift(model, LiftConfig(rank_budget=RANK, selector="random", values_dtype=values))
        loss = tiled_loss
    else:
        model = lora(model, RANK) if name == "PEFT LoRA" else shira(model, RANK)
    ours = name == "leanlift" and dtype == torch.bfloat16  # AdamW would lose small updates
    optimizer = (SparseAdamW if ours else torch.optim.AdamW)(trained(model), lr=1e-4)
    peer = Peer(model.train(), loss, optimizer, ids)
    peer.step(FEW)
    if name == "leanlift":
        peer.stays = lift_state(model).scratch.nbytes
    return peer


def measure(
    hidden: int, layers: int, tokens: int, repeats: int, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """A row per peer, leanlift first, with its ratio to each of the others."""
    names = ("leanlift", "PEFT SHiRA", "PEFT LoRA")
    peers = {name: build(name, hidden, layers, tokens, dtype) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks = {}
    for turn in range(repeats):
        for name, peer in peers.items():
            with LiveBytes() if turn == repeats - 1 else nullcontext() as live:
                started = time.process_time()
                peer.step()
                seconds[name].append(time.process_time() - started)
            if live is not None:
                peaks[name] = live.peak + peer.stays
    times = {name: median(seconds[name]) for name in names}
    return [
        {
            "way": name,
            "steps": repeats,
            "dtype": str(dtype).removeprefix("torch."),
            "entries": entries(peer.model),
            "median s": round(times[name], 3),
            "least s": round(min(seconds[name]), 3),
            "peak MiB": round(peaks[name] / MIB, 1),
            "leanlift / this, time": round(times["leanlift"] / times[name], 3),
            "leanlift / this, peak": round(peaks["leanlift"] / peaks[name], 3),
            "hidden": hidden,
            "layers": layers,
            "tokens": tokens,
            "own 16-bit products": has_products(dtype),
        }
        for name, peer in peers.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = arguments.hidden, arguments.layers, arguments.tokens
    rows: list[dict[str, Any]] = []
    for dtype in (torch.bfloat16, torch.float32):
        repeats = arguments.repeats if has_products(dtype) else 1
        rows += measure(*shape, repeats, dtype)
        gc.collect()
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    few = "" if shape[1] == 10 else f"_{shape[1]}_layers"
    if (shape[0], shape[2]) == (2048, 128):
        print(f"Wrote {write_rows(f'cpu_step{few}', rows)}")


if __name__ == "__main__":
    main()
