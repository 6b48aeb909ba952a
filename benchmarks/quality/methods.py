"""The methods: each turns a base checkpoint into a model whose trained parameters are set."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from torch import Tensor

from benchmarks.quality.base import load
from benchmarks.quality.domain import Domain
from benchmarks.quality.residual import exact_from_the_start, taken_out
from leanlift import LiftConfig, get_lift_model
from leanlift.model import claim

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CALIBRATION_BATCHES = 8


@dataclass
class Prepared:
    """A model ready to be trained.

    Attributes:
        model: parameters that train require a gradient, no others.
        lift: whether leanlift owns it.
        refresh: steps between mask refreshes; 0: never.
        start: offsets that training starts from, by layer, where they are not zero.
    """

    model: Any
    lift: bool = False
    refresh: int = 0
    start: dict[str, Tensor] = field(default_factory=dict)


Build = Callable[[Path, Domain, int, torch.device], Prepared]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: in the table.
        group: which table it belongs to.
        build: (base directory, domain, seed, device) -> Prepared.
        lrs: learning rates to sweep; the sweep goes on where the best is at an end.
        lr_of: take the best learning rate of this other method instead of sweeping.
        merge: also measure both merges.
        schedule: what is different from the preset's schedule.
    """

    name: str
    group: str
    build: Build
    lrs: tuple[float, ...] = ()
    lr_of: str | None = None
    merge: bool = False
    schedule: dict[str, float] = field(default_factory=dict)


def full() -> Build:
    """Every weight, norms and embedding included."""

    def build(base: Path, domain: Domain, seed: int, device: torch.device) -> Prepared:
        return Prepared(load(base, "dense", device))

    return build


def lora(kind: str, r: int) -> Build:
    """PEFT's LoRA on every Linear of the blocks: r·(m+n) parameters each."""

    def build(base: Path, domain: Domain, seed: int, device: torch.device) -> Prepared:
        torch.manual_seed(seed)
        config = LoraConfig(
            r=r, lora_alpha=2 * r, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM"
        )
        return Prepared(get_peft_model(load(base, kind, device), config))

    return build


def shira(kind: str, r: int) -> Build:
    """PEFT's SHiRA: a static random mask of r·(m+n) entries."""

    def build(base: Path, domain: Domain, seed: int, device: torch.device) -> Prepared:
        config = ShiraConfig(
            r=r, mask_type="random", random_seed=seed, target_modules=TARGETS, task_type="CAUSAL_LM"
        )
        return Prepared(get_peft_model(load(base, kind, device), config))

    return build


def lift(kind: str, r: int, start: str = "zero", **config: Any) -> Build:
    """leanlift with r·(m+n) entries.

    Args:
        kind: how the base is held.
        r: the budget.
        start: "zero"; "residual": the selected weights are exact from the start; "taken out": the
            entries selected on the original are also zero when the rest is quantized.
        config: further fields of LiftConfig.
    """

    def build(base: Path, domain: Domain, seed: int, device: torch.device) -> Prepared:
        settings = LiftConfig(rank_budget=r, selection_seed=seed, **config)
        if start == "taken out":
            model, offsets = taken_out(base, kind, settings, device)
        else:
            batches = None
            if settings.selector == "gradient":
                wanted = itertools.islice(domain.train.batches(32, seed), CALIBRATION_BATCHES)
                batches = [{k: t.to(device) for k, t in b.items()} for b in wanted]
            model = load(base, kind, device)
            get_lift_model(model, settings, progress=False, calibration=batches)
            offsets = exact_from_the_start(model, base) if start == "residual" else {}
        claim(model)  # the loop here refreshes it
        return Prepared(model, lift=True, refresh=settings.refresh_interval, start=offsets)

    return build
