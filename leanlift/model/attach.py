"""Turning a stock model into one whose principal weights train.

`get_lift_model` replaces every target Linear by a `LiftLinear` around it, in place, and takes
the base over: whatever said "I am a quantized model, do not train me" no longer describes it.
"""

from __future__ import annotations

import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from leanlift.config import LiftConfig
from leanlift.errors import UserError
from leanlift.fingerprint import BaseFingerprint, fingerprint
from leanlift.layer import FrozenLinear, LiftLinear, Scratch
from leanlift.model.targets import find_targets
from leanlift.quantized import frozen_weight
from leanlift.selection import selection
from leanlift.sparse import SegmentedIndex


@dataclass
class LiftState:
    """What leanlift knows about an attached model; `model.leanlift`.

    Attributes:
        config: the LiftConfig.
        base: the fingerprint of the base.
        scratch: the buffer that all layers share.
        refreshes: mask refreshes so far.
        unconverged: targets whose selection had not settled when it was last made.
        selection_seconds: how long the first selection took.
    """

    config: LiftConfig
    base: BaseFingerprint
    scratch: Scratch
    refreshes: int = 0
    unconverged: list[str] = field(default_factory=list)
    selection_seconds: float = 0.0


def get_lift_model(
    model: nn.Module, config: LiftConfig | None = None, progress: bool = True
) -> Any:
    """Select the principal weights of `model` and make them, and only them, trainable.

    Args:
        model: a causal LM as stock transformers loaded it: `Linear4bit`, `Linear8bitLt` or plain
            Linears. Attach before any forward pass (on a CPU, bitsandbytes repacks 4-bit weights
            in its own forward, which makes them unreadable).
        config: what to train; `LiftConfig()` if not given.
        progress: whether to show a bar over the layers.

    Returns:
        The same model object, changed in place.

    Raises:
        UserError: no target, a target that cannot be read, a budget that selects nothing, NaN
            weights. The model is unchanged then.
    """
    config = config or LiftConfig()
    scorer = config.scorer()
    unconverged: list[str] = []

    def choose(name: str, module: nn.Module) -> SegmentedIndex:
        weight = frozen_weight(module, name)
        chosen = selection(weight, scorer, config.count(weight.shape, name), name)
        if not chosen.converged:
            unconverged.append(name)
        return SegmentedIndex.from_flat(chosen.flat, weight.shape)

    started = time.perf_counter()
    attach(model, config, choose, "Selecting", progress)
    state = lift_state(model)
    state.unconverged = unconverged
    state.selection_seconds = time.perf_counter() - started
    return model


def attach(
    model: nn.Module,
    config: LiftConfig,
    choose: Callable[[str, nn.Module], SegmentedIndex],
    what: str,
    progress: bool,
    accept: Callable[[BaseFingerprint], None] = lambda base: None,
) -> None:
    """Replace the targets of `model` by LiftLinears at the positions that `choose` gives.

    `accept` may refuse the base by raising, before anything is changed.
    """
    if lift_layers(model):
        raise UserError(
            "this model has leanlift layers already: load the base again to start over."
        )
    targets = find_targets(model, config.target_modules)
    modules = dict(model.named_modules())
    source = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    base = fingerprint(model, source, _dtype(model), targets)
    accept(base)
    for target in targets:  # before the first change, so that a refusal changes nothing
        config.count(base.shapes[target], target)
    indices = {}
    with tqdm(targets, desc=what, unit="matrix", disable=not progress) as bar:
        for target in bar:
            bar.set_postfix_str(target, refresh=False)
            indices[target] = choose(target, modules[target])

    model.requires_grad_(False)
    scratch = Scratch()
    for name, module in modules.items():
        if name in indices:
            weight = frozen_weight(module, name)
            model.set_submodule(name, LiftLinear(module, weight, indices[name], scratch))
        elif name in base.formats:  # quantized, but not trained
            model.set_submodule(name, FrozenLinear(module, frozen_weight(module, name), scratch))
    _own_base(model)
    holder: Any = model
    holder.leanlift = LiftState(config, base, scratch)
    holder.print_trainable_parameters = types.MethodType(print_trainable_parameters, model)


def lift_layers(model: nn.Module) -> dict[str, LiftLinear]:
    """The patched layers of a model by name, in model order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LiftLinear)}


def lift_state(model: nn.Module) -> LiftState:
    """What leanlift knows about an attached model.

    Raises:
        UserError: nothing is attached.
    """
    state = getattr(model, "leanlift", None)
    if not isinstance(state, LiftState):
        raise UserError(
            f"this {type(model).__name__} has no leanlift layers: call "
            "get_lift_model(model, LiftConfig(...)) first."
        )
    return state


def print_trainable_parameters(model: nn.Module) -> None:
    """Print trained entries, weights in all, and their share."""
    layers = lift_layers(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = [m for m in model.modules() if isinstance(m, FrozenLinear)]
    apart = {id(layer.base.weight) for layer in frozen} | {id(m.values) for m in layers.values()}
    total = sum(p.numel() for p in model.parameters() if id(p) not in apart)
    total += sum(layer.in_features * layer.out_features for layer in frozen)
    print(
        f"trainable params: {trainable:,} || all params: {total:,} || "
        f"trainable%: {100 * trainable / total:.4f}"
    )


def _dtype(model: nn.Module) -> torch.dtype:
    """The dtype the model was loaded in."""
    dtype = getattr(model, "dtype", None)
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    return next(p.dtype for p in model.parameters() if p.dtype.is_floating_point)


def _own_base(model: nn.Module) -> None:
    """Drop the marks of a quantized model: HF Trainer would refuse it, TRL would cast its
    trainable parameters to bf16, `save_pretrained` would write a quantization_config."""
    holder: Any = model
    for mark, unset in (
        ("is_quantized", False),
        ("is_loaded_in_4bit", False),
        ("is_loaded_in_8bit", False),
        ("hf_quantizer", None),
        ("quantization_method", None),
    ):
        if getattr(model, mark, None):
            setattr(holder, mark, unset)
    config: Any = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
