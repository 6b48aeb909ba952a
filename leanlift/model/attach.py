"""Turning a stock model into one whose principal weights train.

`get_lift_model` replaces every target Linear by a `LiftLinear` around it, in place, and takes
the base over: whatever said "I am a quantized model, do not train me" no longer describes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from leanlift.config import LiftConfig
from leanlift.errors import UserError
from leanlift.fingerprint import BaseFingerprint, fingerprint
from leanlift.layer import FrozenLinear, LiftLinear, Scratch
from leanlift.model.base import (
    base_dtype,
    base_name,
    base_revision,
    check_attachable,
    check_finite,
    checkpoint_of,
    own_base,
    with_base_samples,
)
from leanlift.model.embedding import grow_embedding, rows_to_grow_to, with_more_rows
from leanlift.model.ends import check_ends, quantize_ends
from leanlift.model.gated import use_gated_product
from leanlift.model.gradient import gradient_masks
from leanlift.model.strangers import guard
from leanlift.model.targets import find_targets
from leanlift.ops import resolve
from leanlift.quantized import FrozenWeight, frozen_weight, is_quantized
from leanlift.selection import selection
from leanlift.source import check_homes
from leanlift.sparse import SegmentedIndex


@dataclass
class LiftState:
    """What leanlift knows about an attached model; `model.leanlift`.

    Attributes:
        config: the LiftConfig.
        base: the fingerprint of the base.
        scratch: the buffer that all layers share.
        refreshes: mask refreshes so far.
        ends_quantized: whether the embedding and the head are held in INT8.
        embedding_rows: of an embedding with more rows than the base's; None: it has those.
        unconverged: targets whose selection had not converged when it was last made.
        selection_seconds: how long the first selection took.
        claimed: whether whoever trains the model knows what its config asks for.
    """

    config: LiftConfig
    base: BaseFingerprint
    scratch: Scratch
    refreshes: int = 0
    ends_quantized: bool = False
    embedding_rows: int | None = None
    unconverged: list[str] = field(default_factory=list)
    selection_seconds: float = 0.0
    claimed: bool = False


@dataclass(frozen=True)
class Choice:
    """The positions chosen for a target, and whether they are the one right choice."""

    index: SegmentedIndex
    converged: bool


def get_lift_model(
    model: nn.Module,
    config: LiftConfig | None = None,
    progress: bool = True,
    calibration: Iterable[Mapping[str, Tensor]] | None = None,
    embedding_rows: int | None = None,
) -> Any:
    """Select the principal weights of `model` and make them, and only them, trainable.

    Args:
        model: a causal LM as stock transformers loaded it: `Linear4bit`, `Linear8bitLt` or plain
            Linears. Attach before any forward pass (on a CPU, bitsandbytes repacks 4-bit weights
            in its own forward, which makes them unreadable).
        config: what to train; `LiftConfig()` if not given.
        progress: whether to show a bar over the layers.
        calibration: for `selector="gradient"`: batches with `input_ids` and `labels`, gone
            through several times.
        embedding_rows: how many rows the embedding and the head need, `len(tokenizer)` where
            tokens were added to it. Missing ones are made of the base's (`leanlift.grown`),
            frozen, and come back wherever the adapter is loaded or merged.

    Returns:
        The same model object, changed in place.

    Raises:
        UserError: no target, a target that cannot be read, a budget that selects nothing, NaN
            weights, an embedding that cannot grow. The model is unchanged then.
    """
    config = config or LiftConfig()
    started = time.perf_counter()
    check_attachable(model)
    if config.selector == "gradient":
        with with_more_rows(model, embedding_rows):
            masks = _masks_by_gradient(model, config, calibration or (), progress)

        def choose(name: str, weight: FrozenWeight) -> Choice:
            return Choice(SegmentedIndex.from_flat(masks[name], weight.shape), converged=True)

    else:
        scorer = config.scorer()

        def choose(name: str, weight: FrozenWeight) -> Choice:
            count = config.count(weight.shape, name)
            chosen = selection(weight, scorer, count, name, config.selection_tile_bytes)
            return Choice(SegmentedIndex.from_flat(chosen.flat, weight.shape), chosen.converged)

    def budget_is_possible(base: BaseFingerprint) -> None:
        for target, shape in base.shapes.items():
            config.count(shape, target)

    targets = find_targets(model, config.target_modules)
    config.check_patterns(targets)
    attach(
        model,
        config,
        targets,
        choose,
        "Selecting",
        progress,
        budget_is_possible,
        embedding_rows=embedding_rows,
    )
    lift_state(model).selection_seconds = time.perf_counter() - started
    return model


def attach(
    model: nn.Module,
    config: LiftConfig,
    targets: list[str],
    choose: Callable[[str, FrozenWeight], Choice],
    what: str,
    progress: bool,
    accept: Callable[[BaseFingerprint], None],
    sample: bool = True,
    embedding_rows: int | None = None,
) -> None:
    """Replace the targets of a stock model by LiftLinears at the positions that `choose` gives.

    `accept` may refuse the base by raising, before anything is changed. `sample` says whether the
    fingerprint gets samples of the targets. The embedding grows to `embedding_rows` where it has
    fewer, after the fingerprint of the base has been taken.
    """
    check_finite(model)
    modules = dict(model.named_modules())
    base = fingerprint(model, base_name(model), base_dtype(model), targets, base_revision(model))
    accept(base)
    checkpoint = checkpoint_of(base)
    if checkpoint is not None:
        check_homes(base, checkpoint)
    if config.quantize_ends:
        check_ends(model)
    embedding_rows = rows_to_grow_to(model, embedding_rows)
    choices: dict[str, Choice] = {}
    with tqdm(targets, desc=what, unit="matrix", disable=not progress) as bar:
        for target in bar:
            started = time.perf_counter()
            choices[target] = choose(target, frozen_weight(modules[target], target))
            note = "" if choices[target].converged else ", not converged"
            bar.set_postfix_str(f"{target} {time.perf_counter() - started:.1f} s{note}")

    if sample:
        indices = {name: choice.index for name, choice in choices.items()}
        base = with_base_samples(base, indices, modules, checkpoint)
    model.requires_grad_(False)
    scratch, values_dtype = Scratch(), getattr(torch, config.values_dtype)
    for name, module in modules.items():
        if name in choices:
            weight, index = frozen_weight(module, name), choices[name].index
            model.set_submodule(name, LiftLinear(module, weight, index, scratch, values_dtype))
        elif name in base.formats:  # quantized, but not trained
            model.set_submodule(name, FrozenLinear(module, frozen_weight(module, name), scratch))
    use_gated_product(model)
    if embedding_rows is not None:
        grow_embedding(model, embedding_rows)
    if config.quantize_ends:
        base = replace(base, formats={**base.formats, **quantize_ends(model)})
    own_base(model)
    holder: Any = model
    unconverged = [name for name, choice in choices.items() if not choice.converged]
    holder.leanlift = LiftState(
        config,
        base,
        scratch,
        ends_quantized=config.quantize_ends,
        embedding_rows=embedding_rows,
        unconverged=unconverged,
    )
    holder.print_trainable_parameters = partial(print_trainable_parameters, model)
    guard(model)


def _masks_by_gradient(
    model: nn.Module,
    config: LiftConfig,
    calibration: Iterable[Mapping[str, Tensor]],
    progress: bool,
) -> dict[str, Tensor]:
    """Run the calibration set through the frozen model, with our forward in every target and
    every quantized Linear; the model is as before afterwards."""
    targets = find_targets(model, config.target_modules)
    modules = dict(model.named_modules())
    weights = {name: frozen_weight(modules[name], name) for name in targets}
    counts = {name: config.count(weight.shape, name) for name, weight in weights.items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    scratch = Scratch()
    frozen = {
        name: FrozenLinear(module, frozen_weight(module, name), scratch)
        for name, module in modules.items()
        if name in weights or is_quantized(module)
    }
    try:
        model.requires_grad_(False)
        for name, layer in frozen.items():
            model.set_submodule(name, layer)
        layers = {name: frozen[name] for name in targets}
        return gradient_masks(model, layers, counts, calibration, progress=progress)
    finally:
        for name in frozen:
            model.set_submodule(name, modules[name])
        for parameter in trained:
            parameter.requires_grad_(True)


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


def use_ops(model: nn.Module, name: str) -> None:
    """Choose what computes in the layers of an attached model.

    It belongs to the machine, not to the adapter: nothing of it is saved.

    Args:
        model: an attached model, on its device.
        name: "auto" (Triton on CUDA where it can be imported, else torch; what a model starts
            with), "torch" or "triton".

    Raises:
        UserError: nothing is attached, an unknown name, or "triton" where it cannot run.
    """
    scratch = lift_state(model).scratch
    resolve(name, next(iter(lift_layers(model).values())).values.device)
    scratch.implementation = name


def weights_of(model: nn.Module) -> tuple[int, int]:
    """Trained entries of an attached model, and its weights in all."""
    layers = lift_layers(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = [m for m in model.modules() if isinstance(m, FrozenLinear)]
    apart = {id(layer.base.weight) for layer in frozen} | {id(m.values) for m in layers.values()}
    total = sum(p.numel() for p in model.parameters() if id(p) not in apart)
    total += sum(layer.in_features * layer.out_features for layer in frozen)
    return trainable, total


def print_trainable_parameters(model: nn.Module) -> None:
    """Print trained entries, weights in all, and their share."""
    trainable, total = weights_of(model)
    print(
        f"trainable params: {trainable:,} || all params: {total:,} || "
        f"trainable%: {100 * trainable / total:.4f}"
    )
