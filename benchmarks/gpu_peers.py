"""PEFT's methods beside leanlift on a GPU, each in turn with it, with and without Liger's kernels.

A part of `gpu_proof`. All have the same base, attention by torch, checkpointing and an optimizer
with 8-bit moments; as many entries are trained by each mask as by leanlift.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks import liger
from benchmarks.gpu_profile import modelled_step, profiled, speed
from benchmarks.gpu_steps import release
from benchmarks.trainee import DENSITY, GIB, RANK, Scale, Trainee, base

Rows = list[dict[str, Any]]
Around = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Peer:
    """A method of PEFT's.

    Attributes:
        name: in the rows.
        make: the model of a scale, where so many entries are trained with leanlift.
        autocast: whether its forward pass is under bf16 autocast, as fp32 adapters are trained.
        bar: of leanlift's time over its.
        peak_bar: of leanlift's peak over its.
        modelled: what `modelled_step` has it as; "": nothing.
    """

    name: str
    make: Callable[[Scale, int], Any]
    autocast: bool = False
    bar: float | None = None
    peak_bar: float | None = None
    modelled: str = ""

    def built(self, scale: Scale, count: int) -> tuple[Any, Any, Any, Any]:
        """Model, loss, optimizer, what is around a forward pass."""
        import bitsandbytes as bnb

        from benchmarks.peers import stock_loss, trained

        model = self.make(scale, count)
        model.enable_input_require_grads()
        # paged state would not be counted
        kind = bnb.optim.AdamW8bit if scale.cuda else torch.optim.AdamW
        around: Around = nullcontext
        if self.autocast:
            around = partial(torch.autocast, scale.device.type, torch.bfloat16)
        return model.train(), stock_loss, kind(trained(model), lr=1e-4), around


def _qlora(scale: Scale, count: int, dtype: torch.dtype | None = None) -> Any:
    from benchmarks.peers import lora

    return lora(base(scale), RANK, dtype)


def _shira(scale: Scale, count: int) -> Any:
    """Of PEFT's rank that comes next to so many entries."""
    from benchmarks.peers import shira

    width, layers, _ = scale.shape
    both = 4 * 2 * width + 3 * (width + width * 11008 // 4096)  # sides of a block's matrices
    return shira(base(scale), max(1, round(count / (layers * both))))


def _super_tuning(scale: Scale, count: int) -> Any:
    from benchmarks.peers import super_tuning

    return super_tuning(base(scale, quantized=False), DENSITY)


PEERS = (
    Peer(f"QLoRA r={RANK}", _qlora, bar=1.0, modelled="QLoRA"),
    Peer(f"QLoRA r={RANK}, fp32 adapters", partial(_qlora, dtype=torch.float32), autocast=True),
    Peer("SHiRA", _shira, bar=1 / 1.5, peak_bar=0.6),
    Peer("Super-Tuning, 16-bit base", _super_tuning),
)


def beside(scale: Scale, ours: Trainee, peer: Peer) -> Rows:
    """A peer and leanlift in turn: times, peaks, the peer's profile; then both with Liger's."""
    from benchmarks.peers import entries

    try:
        theirs = Trainee(scale, lambda: peer.built(scale, entries(ours.model)))
    except (ImportError, torch.OutOfMemoryError) as error:
        return [{"what": peer.name, "value": _skipped(error)}]
    rows: Rows = [{"what": f"{peer.name}, entries", "value": entries(theirs.model)}]
    rows += _in_turn(scale, ours, theirs, peer, "")
    if scale.cuda:
        modelled = modelled_step(scale, peer.modelled) if peer.modelled else None
        rows += profiled(theirs, peer.name, modelled)
    try:
        with liger.within(ours.model), liger.fused(theirs.model):
            ours.once()  # which compiles
            theirs.once()
            rows += _in_turn(scale, ours, theirs, peer, ", Liger")
    except Exception as error:  # whatever it lacks here: what was measured without it stays
        rows.append({"what": f"{peer.name}, Liger", "value": _skipped(error)})
        ours.optimizer.zero_grad()
    del theirs
    release()
    return rows


def _skipped(error: Exception) -> str:
    return f"skipped: {type(error).__name__} {error}"[:160]


def _in_turn(scale: Scale, ours: Trainee, theirs: Trainee, peer: Peer, how: str) -> Rows:
    for trainee in (ours, theirs):
        trainee.seconds.clear()
        trainee.peaks.clear()
    for _ in range(max(3, scale.steps // 3)):
        ours.step()
        theirs.step()
    name, us = f"{peer.name}{how}", f"leanlift{how}"
    first, second = median(ours.seconds), median(theirs.seconds)
    share = first / second
    held = _held(share, None if scale.small else peer.bar)
    rows: Rows = [
        {"what": f"{name}, step s", "value": round(second, 4)},
        *speed(scale, name, second),
        {"what": f"{us} beside {peer.name}, step s", "value": round(first, 4)},
        {"what": f"{us} / {name}, step", "value": round(share, 3), **held},
    ]
    if theirs.peaks:
        peak = max(ours.peaks) / max(theirs.peaks)
        rows += [
            {"what": f"{name}, allocated GiB", "value": round(max(theirs.peaks) / GIB, 3)},
            {
                "what": f"{us} / {name}, peak",
                "value": round(peak, 3),
                **_held(peak, None if scale.small else peer.peak_bar),
            },
        ]
    return rows


def _held(value: float, bar: float | None) -> dict[str, Any]:
    return {} if bar is None else {"bar": f"<= {bar:.3g}", "holds": value <= bar}
