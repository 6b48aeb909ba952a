"""A model that can be stepped and measured, with leanlift in one of three settings.

A part of `gpu_proof`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import leanlift
from benchmarks import card
from benchmarks.common import timed

GIB = 2**30
RANK = 64
DENSITY = 0.05
OWN = Path(leanlift.__file__).parent


@dataclass(frozen=True)
class Scale:
    """How large the proof is."""

    device: torch.device
    small: bool

    @property
    def cuda(self) -> bool:
        """Whether there is a card to ask for its memory and its time."""
        return card.present()

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def shape(self) -> tuple[int, int, int]:
        """Width, layers, vocabulary."""
        return (256, 2, 512) if self.small else (4096, 32, 32000)

    @property
    def tokens(self) -> int:
        return 64 if self.small else 2048

    @property
    def steps(self) -> int:
        return 3 if self.small else 20

    @property
    def ids(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, self.shape[2], (1, self.tokens), generator=generator).to(
            self.device
        )


class Trainee:
    """A model that can step; its peak is counted without whatever else is on the device."""

    def __init__(self, scale: Scale, build: Callable[[], tuple[Any, Any, Any, Any]]) -> None:
        self.scale, self.ids = scale, scale.ids
        before = allocated(scale)
        self.model, self.loss, self.optimizer, self.around = build()
        self.seconds: list[float] = []
        self.peaks: list[int] = []
        self.static = 0
        self.step()
        gc.collect()
        self.static = allocated(scale) - before
        self.seconds.clear()
        self.peaks.clear()

    def step(self) -> None:
        start = allocated(self.scale)
        if self.scale.cuda:
            card.reset_peaks()
        self.seconds.append(timed(self.once)[1])
        if self.scale.cuda:
            self.peaks.append(self.static + card.peak() - start)

    def waits(self) -> str:
        """Where leanlift makes the host wait for the device in a step: "nothing", or the places.
        transformers asks the attention mask for its values; that is not looked at."""
        return ", ".join(card.waits(self.once, OWN)) or "nothing"

    def once(self) -> None:
        """A step that is not measured."""
        with self.around():
            loss = self.loss(self.model, self.ids)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def allocated(scale: Scale) -> int:
    return card.allocated() if scale.cuda else 0


def base(scale: Scale, quantized: bool = True) -> Any:
    """A model of this scale whose blocks recompute their activations, in NF4 or as it is."""
    from benchmarks.peers import llama, nf4_llama

    model = nf4_llama(llama(*scale.shape), scale.device, scale.dtype, quantized=quantized)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def lifted(
    scale: Scale, setting: str, selector: str, peak: list[int] | None = None
) -> tuple[Any, Any, Any, Any]:
    """leanlift in one of three settings: model, loss, optimizer, what is around a forward pass.

    What attaching had allocated at its peak, beyond the model, goes to `peak`.
    """
    from benchmarks.peers import lift, tiled_loss, trained
    from leanlift import LiftConfig
    from leanlift.model import embedding_to_cpu
    from leanlift.optim import SparseAdamW

    config = LiftConfig(
        density=DENSITY,
        approx_rank=8 if scale.small else RANK,
        selector=selector,
        values_dtype="bfloat16",
        quantize_embeddings=setting != "default",
    )
    model, start = base(scale), allocated(scale)
    if scale.cuda:
        card.reset_peaks()
    model = lift(model, config).train()
    if peak is not None and scale.cuda:
        peak.append(card.peak() - start)
    optimizer = SparseAdamW(trained(model), lr=1e-4, moments="8bit")
    if setting != "default":
        for values in trained(model):
            values.register_post_accumulate_grad_hook(_updating(optimizer))
    around: Any = nullcontext
    if setting == "offloaded" and scale.cuda:
        embedding_to_cpu(model)

        from leanlift.model import lifted as inner
        from leanlift.streaming.offload import Host, Offload

        offloading = Offload(inner(model), Host(scale.device))

        def around() -> Any:
            return offloading

    return model, tiled_loss, optimizer, around


def _updating(optimizer: Any) -> Callable[[torch.Tensor], None]:
    def update(values: torch.Tensor) -> None:
        assert values.grad is not None
        optimizer.step_parameter(values, torch.isfinite(values.grad).all())
        values.grad = None

    return update
