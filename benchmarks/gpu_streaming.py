"""Blocks that come from the host, on a GPU: the same bits, what the bus hides, what is left behind.

A part of `gpu_proof`. A few blocks of the model's width are trained with updates in the backward
pass: resident, with a streamed base, and with streamed state. On a GPU attention is computed by its
plain form, since the others sum in another order each time. And rows eight times as long, with
activations that wait on the host: whole, and with MLPs and norms in pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from statistics import median
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import card
from benchmarks.common import timed
from benchmarks.gpu_steps import release
from benchmarks.trainee import Scale

GIB = 2**30
BLOCKS = 6
HOW = {"resident": (False, False), "streamed": (True, False), "streamed state": (True, True)}

Rows = list[dict[str, Any]]


def streaming(scale: Scale) -> Rows:
    """Each way of it beside the resident one."""
    rows: Rows = []
    found: dict[str, Any] = {}
    for name, (base, state) in HOW.items():
        run = Run(scale, base, state)
        for _ in range(scale.steps):
            run.step()
        with run.apart():
            found[name] = run.losses, run.learned(), median(run.seconds[1:])
        rows.append({"what": f"{name}, step s", "value": round(found[name][2], 4)})
        rows += [{"what": f"{name}, {what}", **row} for what, row in run.said().items()]
        if name == "resident":
            continue
        losses, learned, seconds = found["resident"]
        same = run.losses == losses and all(map(torch.equal, found[name][1], learned))
        rows.append({"what": f"{name}, bits", "value": "same" if same else "others", "holds": same})
        rows.append(
            {"what": f"{name} / resident, step", "value": round(found[name][2] / seconds, 3)}
        )
    return rows


def long_rows(scale: Scale) -> Rows:
    """Steps over long rows: their time and peak, and whether offloading leaves something behind."""
    rows: Rows = []
    for name in ("whole", "in pieces"):
        run = Run(scale, False, False)
        if name == "in pieces":
            from leanlift.model import tiled_mlp

            tiled_mlp(run.model)
        run.offload(8)
        for _ in range(4):
            run.step()
        rows.append({"what": f"long rows, {name}, step s", "value": round(min(run.seconds[1:]), 4)})
        rows += [{"what": f"long rows, {name}, {what}", **row} for what, row in run.said().items()]
        if run.cuda:
            peak = round(max(run.peaks[1:]) / GIB, 3)
            rows.append({"what": f"long rows, {name}, allocated GiB", "value": peak})
        del run
        release()
    return rows


class Run:
    """A model that steps, and what it leaves behind.

    Args:
        scale: how large; of the blocks a few.
        base, state: what is streamed.
    """

    def __init__(self, scale: Scale, base: bool, state: bool) -> None:
        from benchmarks.peers import lift, llama, nf4_llama, trained
        from leanlift import LiftConfig
        from leanlift.model import stream_base
        from leanlift.model.stream_state import stream_moments
        from leanlift.optim import SparseAdamW
        from leanlift.training.step_guard import GradientHooks, StepGuard

        self.scale, self.cuda, self.ordered = scale, scale.cuda, True
        torch.manual_seed(0)
        width, _, vocabulary = scale.shape
        model = nf4_llama(llama(width, BLOCKS, vocabulary), scale.device, scale.dtype)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        self.pool = stream_base(model, scale.device, state) if base else None
        config = LiftConfig(density=0.05, values_dtype="bfloat16", selector="random")
        self.model = lift(model, config).train()
        optimizer = SparseAdamW(trained(self.model), lr=1e-3, moments="8bit")
        stream_moments(self.model, optimizer)
        self.guard = StepGuard(1)
        self._hooks = GradientHooks(self.model, self.guard, optimizer)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.peaks: list[int] = []
        self.ids = scale.ids
        self.around: AbstractContextManager[Any] = nullcontext()
        self.allocated: list[int] = []
        self.pinned: list[int] = []

    def step(self) -> None:
        """One, with what is allocated and pinned after it."""
        from benchmarks.peers import tiled_loss
        from leanlift.model.stream_state import let_rest

        def once() -> float:
            with self.apart():
                with self.around:
                    loss = tiled_loss(self.model, self.ids)
                loss.backward()
            self.guard.end_step(len(self.losses), lambda: "nothing was saved")
            let_rest(self.model)
            return float(loss.detach())

        if self.cuda:
            card.reset_peaks()
        loss, seconds = timed(once)
        self.losses.append(loss)
        self.seconds.append(seconds)
        if self.cuda:
            self.peaks.append(card.peak())
            self.allocated.append(card.allocated())
            self.pinned.append(card.pinned())

    def offload(self, times: int) -> None:
        """Go on with rows so many times as long, what is kept of them waiting on the host, and with
        any form of attention."""
        from leanlift.model import lifted
        from leanlift.streaming.offload import Host, Offload

        self.ids, self.ordered = self.ids.repeat(1, times), False
        self.around = Offload(lifted(self.model), Host(self.scale.device))

    @contextmanager
    def apart(self) -> Iterator[None]:
        """With the one form of attention whose sums have an order."""
        with sdpa_kernel(SDPBackend.MATH) if self.cuda and self.ordered else nullcontext():
            yield

    def learned(self) -> list[torch.Tensor]:
        """The offsets, on the host."""
        from leanlift.model import lift_layers

        layers = lift_layers(self.model).values()
        return [layer.values.detach().cpu().clone() for layer in layers]

    def said(self) -> dict[str, dict[str, Any]]:
        """What is left behind, and how the bus does."""
        rows: dict[str, dict[str, Any]] = {}
        for name, held in (("allocated", self.allocated), ("pinned", self.pinned)):
            if held:
                creep = held[-1] - held[len(held) // 3]
                rows[f"{name} creep MiB"] = {
                    "value": round(creep / 2**20, 2), "bar": "<= 1", "holds": creep <= 2**20,
                }  # fmt: skip
        if self.pool is not None and self.cuda:
            block = self.pool.blocks[0]
            seconds = copied(lambda: self.pool.buffers[0].memory[: block.nbytes].copy_(block.host))
            rows["a block over the bus, ms"] = {"value": round(1e3 * seconds, 3)}
            rows["bus GB/s"] = {"value": round(block.nbytes / seconds / 1e9, 1)}
        return rows


def copied(copy: Callable[[], Any]) -> float:
    """Seconds of a copy, the best of a few."""
    return min(timed(copy)[1] for _ in range(5))
