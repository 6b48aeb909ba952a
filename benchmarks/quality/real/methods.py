"""The methods: each turns a base into a model whose trained parameters are set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, ShiraConfig, SupertuningConfig, get_peft_model

from benchmarks.quality.real.base import Base
from benchmarks.quality.real.measure import padded
from benchmarks.quality.real.texts import TokenRow
from leanlift import LiftConfig
from leanlift.model import claim, lift
from leanlift.training.room import free_host_nbytes

CALIBRATION = 8
"""Batches of training rows for what looks at gradients."""
GIB = 2**30


class LeftOutError(Exception):
    """A method that cannot be run on this base or machine, and why."""


@dataclass
class Prepared:
    """A model ready to be trained.

    Attributes:
        model: parameters that train require a gradient, no others.
        refresh: steps between mask refreshes; 0: never.
        lr_factors: by which the learning rate of a parameter is multiplied, by its name.
    """

    model: Any
    refresh: int = 0
    lr_factors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What a method is built for.

    Attributes:
        base: the checkpoint.
        r: r·(m+n) parameters are trained in every matrix.
        seed: of the run.
        calibration: batches of training rows.
    """

    base: Base
    r: int
    seed: int
    calibration: list[list[TokenRow]]


Build = Callable[[Setting], Prepared]


def full(setting: Setting) -> Prepared:
    """Every weight, norms and embedding included, in fp32."""
    base = setting.base
    on_card = base.device.type == "cuda"
    free = torch.cuda.mem_get_info(base.device)[0] if on_card else free_host_nbytes()
    needed = 18 * base.numel
    if free is not None and needed > free:
        raise LeftOutError(f"needs about {needed / GIB:.1f} GiB, {free / GIB:.1f} are free")
    return Prepared(base.load("32"))


def lora(form: str, **more: Any) -> Build:
    """PEFT's LoRA on every Linear of the blocks, alpha = 2 r."""

    def build(setting: Setting) -> Prepared:
        torch.manual_seed(setting.seed)
        r = setting.r
        return _peft(setting, form, LoraConfig(r=r, lora_alpha=2 * r, **_where(setting), **more))

    return build


def shira(form: str) -> Build:
    """PEFT's SHiRA: a random mask of r·(m+n) entries a matrix."""

    def build(setting: Setting) -> Prepared:
        config = ShiraConfig(r=setting.r, random_seed=setting.seed, **_where(setting))
        return _peft(setting, form, config)

    return build


def super_tuning(form: str) -> Build:
    """PEFT's Super-Tuning: the largest weights, one density for all matrices."""

    def build(setting: Setting) -> Prepared:
        sparsity = 1 - setting.base.share(setting.r)
        return _peft(setting, form, SupertuningConfig(sparsity=sparsity, **_where(setting)))

    return build


def _where(setting: Setting) -> dict[str, Any]:
    return {"target_modules": list(setting.base.shapes), "task_type": "CAUSAL_LM"}


def _peft(setting: Setting, form: str, config: Any) -> Prepared:
    try:
        return Prepared(get_peft_model(setting.base.load(form), config))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise LeftOutError(f"PEFT: {error}") from None


def leanlift(form: str, **config: Any) -> Build:
    """leanlift with r·(m+n) entries a matrix; `config` has further fields of LiftConfig."""

    def build(setting: Setting) -> Prepared:
        settings = LiftConfig(rank_budget=setting.r, selection_seed=setting.seed, **config)
        model = setting.base.load(form)
        batches = None
        if settings.selector == "gradient":
            batches = [as_batch(rows, setting.base) for rows in setting.calibration]
        with setting.base.autocast():
            lift(model, settings, progress=False, calibration=batches)
        claim(model)  # the loop here refreshes it
        return Prepared(model, refresh=settings.refresh_interval)

    return build


def as_batch(rows: list[TokenRow], base: Base) -> dict[str, torch.Tensor]:
    """What a model's own forward takes, labels included."""
    ids, counts, first = padded(rows, base.device)
    labels = torch.full_like(ids, -100)
    labels[:, first:][counts] = ids[:, first:][counts]
    return {"input_ids": ids, "labels": labels}
