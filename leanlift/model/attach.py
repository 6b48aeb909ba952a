"""Turning a stock model into one whose principal weights train.

`lift` replaces every target Linear by a `LiftLinear` around it, in place, and takes
the base over: whatever said "I am a quantized model, do not train me" no longer describes it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from leanlift.config import LiftConfig
from leanlift.layers import FrozenLinear, Workspace
from leanlift.model.base import (
    LiveBase,
    check_attachable,
    checkpoint_of,
    stock_base,
    with_base_samples,
)
from leanlift.model.embeddings import check_embeddings, int8
from leanlift.model.gradient import gradient_masks
from leanlift.model.resize_embeddings import rows_to_grow_to, with_more_rows
from leanlift.model.state import LiftState, lift_layers, lift_state, print_trainable_parameters
from leanlift.model.strangers import guard, own_base
from leanlift.model.stream_state import at_rest, stream_state
from leanlift.model.streaming import computes_on, plain_in_pool
from leanlift.model.surgery import layers_over, operate, outer_modules, replace_modules
from leanlift.model.targets import find_targets, what_is_left
from leanlift.model.tokens import check_tokens, lift_tokens
from leanlift.model.whole import begin, check_growth_beside, check_new, whole_modules
from leanlift.ops import resolve
from leanlift.selection import selection, selection_nbytes
from leanlift.source import check_homes
from leanlift.sparse import SegmentedIndex, encoding_nbytes
from leanlift.tiles import part_shape
from leanlift.weights.quantized import FrozenWeight

logger = logging.getLogger("leanlift")


@dataclass(frozen=True)
class Choice:
    """The positions chosen for a target, and whether they are the one right choice."""

    index: SegmentedIndex
    converged: bool


Choose = Callable[[str, FrozenWeight], Choice]
"""Gives the positions of a target, from its name and weight."""


def lift(
    model: nn.Module,
    config: LiftConfig | None = None,
    progress: bool = True,
    calibration: Iterable[Mapping[str, Tensor]] | None = None,
    embedding_rows: int | None = None,
) -> Any:
    """What `get_lift_model` does to a model, in place; its arguments and errors are the same.

    Returns:
        The same model object.
    """
    config = config or LiftConfig()
    started = time.perf_counter()
    check_attachable(model, config.modules_to_save)
    wanted, excluded = config.target_modules, config.exclude_modules
    targets = find_targets(model, wanted, excluded, config.selects)
    left = what_is_left(model, targets, wanted, excluded)
    if left is not None:
        logger.warning("%s", left)
    whole = whole_modules(model, config)
    config.check_patterns(targets, whole)
    check_growth_beside(model, whole, embedding_rows)
    check_tokens(model, config, embedding_rows)
    targets = [name for name in targets if name not in whole]
    base = stock_base(model, [*targets, *whole])
    check_new(model, base.facts.new)
    choose = _chooser(model, config, base, targets, progress, calibration, embedding_rows)
    attach(model, config, base, choose, "Selecting", progress, embedding_rows=embedding_rows)
    begin(model, base.facts.new)
    lift_state(model).selection_seconds = time.perf_counter() - started
    return model


def _chooser(
    model: nn.Module,
    config: LiftConfig,
    base: LiveBase,
    targets: list[str],
    progress: bool,
    calibration: Iterable[Mapping[str, Tensor]] | None,
    embedding_rows: int | None,
) -> Choose:
    """What chooses the positions of each trained matrix: as the config says of the targets, all of
    the others; the arguments are those of `lift`."""
    counts = {name: config.count(part_shape(base.weights[name]), name) for name in targets}
    masks: dict[str, Tensor] = {}
    if config.selector == "gradient":
        weights = {**base.weights, **plain_in_pool(model)}
        with with_more_rows(model, embedding_rows), frozen_layers(model, weights) as layers:
            scored = {name: layers[name] for name in targets}
            masks = gradient_masks(model, scored, counts, calibration or (), progress=progress)
    scorer = None if masks else config.scorer()

    def choose(name: str, weight: FrozenWeight) -> Choice:
        if name not in counts:
            return Choice(SegmentedIndex.full(weight.shape, weight.device), converged=True)
        if scorer is None:
            return Choice(SegmentedIndex.from_flat(masks[name], weight.shape), converged=True)
        found = selection(weight, scorer, counts[name], name, config.selection_tile_bytes)
        return Choice(SegmentedIndex.from_flat(found.flat, weight.shape), found.converged)

    return choose


def choose_in(
    model: nn.Module, base: LiveBase, config: LiftConfig, progress: bool
) -> dict[str, Choice]:
    """The positions of every target of a base, selected from its weights."""
    targets = list(base.facts.shapes)
    choose = _chooser(model, config, base, targets, progress, None, None)
    return _choices(base, choose, "Selecting", progress)


def attach(
    model: nn.Module,
    config: LiftConfig,
    base: LiveBase,
    choose: Choose,
    what: str,
    progress: bool,
    sample: bool = True,
    embedding_rows: int | None = None,
) -> None:
    """Replace the targets of a stock model by LiftLinears at the positions that `choose` gives.

    Args:
        model: whose base `base` is.
        config: what is trained.
        base: the weights and the fingerprint, which names the targets.
        choose: gives the positions of a target, from its name and weight.
        what: is being done, for the bar.
        progress: whether to show one.
        sample: whether the fingerprint gets samples of the targets.
        embedding_rows: rows that the embedding grows to where it has fewer.
    """
    facts, checkpoint = base.facts, checkpoint_of(base.facts)
    if checkpoint is not None:
        check_homes(facts, checkpoint)
    if config.quantize_embeddings:
        check_embeddings(model)
    embedding_rows = rows_to_grow_to(model, embedding_rows)
    choices = _choices(base, choose, what, progress)
    indices = {name: choice.index for name, choice in choices.items()}
    if sample:
        facts = with_base_samples(base, indices, checkpoint)
    workspace = Workspace()
    weights = {**base.weights, **plain_in_pool(model)}
    make_layer = layers_over(weights, indices, workspace, getattr(torch, config.values_dtype))
    hold = partial(int8, device=computes_on(model)) if config.quantize_embeddings else None
    ends = operate(model, make_layer, hold, embedding_rows)
    if config.trainable_token_indices:
        dtype = getattr(torch, config.values_dtype)
        lift_tokens(model, config.trainable_token_indices, workspace, dtype)
    own_base(model)
    holder: Any = model
    holder.leanlift = LiftState(
        config,
        replace(facts, formats={**facts.formats, **ends}),
        workspace=workspace,
        ends_quantized=config.quantize_embeddings,
        embedding_rows=embedding_rows,
        unconverged=[name for name, choice in choices.items() if not choice.converged],
    )
    holder.print_trainable_parameters = partial(print_trainable_parameters, model)
    stream_state(model)
    guard(model)


def _choices(
    base: LiveBase, choose: Callable[[str, FrozenWeight], Choice], what: str, progress: bool
) -> dict[str, Choice]:
    """The positions of every target; what each took is said in the bar."""
    choices: dict[str, Choice] = {}
    with tqdm(base.facts.shapes, desc=what, unit="matrix", disable=not progress) as bar:
        for target in bar:
            started = time.perf_counter()
            weight = base.weights[target]
            chosen = choose(target, weight)
            choices[target] = replace(chosen, index=at_rest(weight, chosen.index))
            note = "" if choices[target].converged else ", not converged"
            bar.set_postfix_str(f"{target} {time.perf_counter() - started:.1f} s{note}")
    return choices


def selecting_nbytes(
    config: LiftConfig,
    shapes: Mapping[str, tuple[int, int]],
    counts: Mapping[str, int],
    itemsize: int,
    parts: Mapping[str, int] | None = None,
) -> int:
    """Peak of selecting beyond what stays, from shapes alone: matrices are selected from one by
    one. What a gradient mask's calibration takes has no rule, and is left out.

    Args:
        config: what is trained.
        shapes, counts: of every target, and of its entries to select.
        itemsize: of the dtype in which rows come.
        parts: how many matrices a target is a stack of, of stacks.
    """
    if config.selector == "gradient":
        return 0
    scorer, tile_bytes = config.scorer(), config.selection_tile_bytes

    def of(name: str) -> int:
        (rows, n), stacked = shapes[name], (parts or {}).get(name, 1)
        shape, count = (rows // stacked, n), counts[name] // stacked
        found = 8 * counts[name] if stacked > 1 else 0  # positions of the others
        chosen = found + selection_nbytes(scorer, shape, count, tile_bytes, itemsize)
        return max(chosen, 8 * counts[name] + encoding_nbytes(counts[name]))

    return max(map(of, shapes), default=0)


@contextmanager
def frozen_layers(
    model: nn.Module, weights: Mapping[str, FrozenWeight]
) -> Iterator[dict[str, FrozenLinear]]:
    """A stock model with our forward over `weights`, and nothing that trains, for a while; gives
    the layers by name."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    replaced: dict[str, nn.Module] = {}
    try:
        model.requires_grad_(False)
        replaced = replace_modules(model, layers_over(weights, {}, Workspace()))
        yield {n: m for n, m in outer_modules(model) if isinstance(m, FrozenLinear)}
    finally:
        replace_modules(model, lambda name, _: replaced.get(name))
        for parameter in trained:
            parameter.requires_grad_(True)


def use_ops(model: nn.Module, name: str) -> None:
    """Choose what computes in the layers of an attached model.

    It belongs to the machine, not to the adapter: nothing of it is saved.

    Args:
        model: an attached model, on its device.
        name: "auto" (Triton on CUDA where it can be imported, else torch; what a model starts
            with), "torch", "triton", or "triton-strips", which leaves out of the values' gradient
            what the mask does not need and takes memory that no plan counts (`ops.triton_strips`).

    Raises:
        UserError: nothing is attached, an unknown name, or one of Triton's where it cannot run.
    """
    workspace = lift_state(model).workspace
    resolve(name, next(iter(lift_layers(model).values())).weight_tiles.device)
    workspace.use(name)
