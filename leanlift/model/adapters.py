"""Adapters on a live model: save, load, switch, scale, unload, without touching the base."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from leanlift.adapters import (
    Adapter,
    AdapterMetadata,
    check_values,
    open_adapter,
    write_adapter,
)
from leanlift.adapters.special import SpecialTokens
from leanlift.adapters.task import Task
from leanlift.errors import UserError
from leanlift.fingerprint import BaseFingerprint, check_same_base
from leanlift.layers import LiftEmbedding, LiftLinear
from leanlift.layers.slot import Slot
from leanlift.layers.tokens import rows_index
from leanlift.model.attach import Choice, attach
from leanlift.model.base import LiveBase, live_base
from leanlift.model.checks import (
    check_checkpoint,
    check_rows,
    check_same_rows,
    check_special,
    configs_of,
)
from leanlift.model.embeddings import quantize_embeddings
from leanlift.model.resize_embeddings import grow_embedding, head_name
from leanlift.model.state import DEFAULT, every_layer, lift_layers, lift_state, lifted
from leanlift.model.surgery import layers_over, replace_modules
from leanlift.model.tokens import check_embedding, drop_tokens, lift_tokens, trained_embedding
from leanlift.model.whole import check_new, empty, whole_modules
from leanlift.sparse import LayerOffsets, SegmentedIndex
from leanlift.weights.grown import Grown
from leanlift.weights.quantized import FrozenWeight


def save_adapter(model: nn.Module, directory: str | Path) -> None:
    """Write the adapter of `model`: positions, offsets, retired entries, config, fingerprint.

    Raises:
        UserError: nothing is attached to the model, or its offsets are scaled or not finite; what
            stood in `directory` stays.
    """
    model, state = lifted(model), lift_state(model)
    layers = _loaded_layers(model)
    check_unscaled(next(iter(layers.values())).scale)
    offsets = {name: layer.learned for name, layer in layers.items()}
    for name, learned in offsets.items():  # what could not be loaded again is not written
        for store in learned.stores:
            check_values(store.values, layers[name].values.dtype, f"{name}.values of this model")
    special = SpecialTokens.of(*configs_of(model))
    grown = None
    if state.embedding_rows is not None:
        grown = Grown(state.embedding_rows, head_name(model))
    known = {f"{module}.weight" for module in (*state.base.formats, head_name(model))}
    layout = state.base.layout.of({*known, *state.base.sampled})
    base = replace(state.base, layout=layout)
    facts = AdapterMetadata(
        state.config, base, state.refreshes, special, grown,
        Task.of(model) if base.new else None,
        trained_embedding(model),
    )  # fmt: skip
    write_adapter(Path(directory), offsets, facts)


def check_unscaled(scale: float) -> None:
    """Refuse to save an adapter that is turned up or down.

    Raises:
        UserError: it is.
    """
    if scale != 1:
        raise UserError(
            f"the adapter is scaled by {scale:g}, which a saved one cannot be: call "
            "scale_adapter(model, 1.0) first, and multiply the saved one with "
            f"leanlift combine --weights {scale:g}."
        )


def load_adapter(model: nn.Module, source: str | Path, progress: bool = False) -> nn.Module:
    """Load an adapter into `model`, in place; returns the same object.

    A stock model gets its layers patched at the adapter's positions, without a new selection. On a
    model that leanlift has attached to already, the adapter takes the place of the present one,
    whatever modules and budgets either has: that is how to switch. Where a matrix trains as many
    entries as before, its Parameter object stays, so an optimizer that knows it goes on working.

    Args:
        model: the adapter's base, in the format that it was trained over.
        source: a directory or hub name; leanlift's own form or one of PEFT's.
        progress: whether to show a bar over the matrices.

    Raises:
        UserError: a damaged adapter, or one of another base. The model is unchanged then.
    """
    given, model = model, lifted(model)

    @functools.cache
    def base_of(names: frozenset[str], whole: tuple[str, ...] = ()) -> LiveBase:
        return live_base(model, names, whole)

    with open_adapter(source, lambda names: base_of(frozenset(names)).sampled()) as adapter:
        if adapter.task is not None:
            adapter.task.check(model, str(adapter.directory))
        base = base_of(frozenset(adapter.base.shapes), tuple(whole_modules(model, adapter.config)))
        check_new(model, adapter.base.new)
        # before anything of the claimed shapes is made
        check_same_base(adapter.base, base.facts, base.weights.__getitem__)
        check_checkpoint(adapter, base.facts)
        check_special(adapter, model)
        check_rows(model, adapter)
        check_embedding(model, adapter)
        offsets = adapter.layers()
        if hasattr(model, "leanlift"):
            _replace(model, adapter, offsets, base)
        else:
            _attach(model, adapter, offsets, base, progress)
        _keep_samples(model, adapter.base)
        for name, layer in lift_layers(model).items():
            layer.put(offsets[name])
            if name in adapter.base.new:
                empty(layer)
        state = lift_state(model)
        state.config, state.refreshes = adapter.config, adapter.refreshes
        adapter.special.put(*configs_of(model))
    return given


def restore_adapter(model: nn.Module, directory: str | Path) -> None:
    """Put a saved adapter back into the layers that are there, for a run that goes on.

    Every Parameter object stays.

    Raises:
        UserError: a damaged adapter, one of another base, or one with other modules, counts or
            dtype than the model trains. The model is unchanged then.
    """
    model, state, layers = lifted(model), lift_state(model), lift_layers(model)
    with open_adapter(directory) as adapter:
        base = live_base(model, adapter.base.shapes, whole_modules(model, adapter.config))
        check_same_base(adapter.base, state.base, base.weights.__getitem__)
        check_same_rows(adapter, state)
        check_embedding(model, adapter)
        if adapter.config.values_dtype != state.config.values_dtype:
            raise UserError(
                f"{directory} has {adapter.config.values_dtype} offsets, but the model trains "
                f"{state.config.values_dtype} ones: use the values_dtype that it was made with."
            )
        offsets = adapter.layers()
        for name, layer in layers.items():
            if name not in offsets or offsets[name].active.count != layer.index.count:
                found = offsets[name].active.count if name in offsets else "no"
                raise UserError(
                    f"{directory} has {found} entries for {name}, but the model trains "
                    f"{layer.index.count}: use the budget and targets that the adapter was made "
                    "with."
                )
        for name, layer in layers.items():
            layer.put(offsets[name])
        state.config, state.refreshes = adapter.config, adapter.refreshes


def unload_adapter(model: nn.Module) -> nn.Module:
    """Take the adapter off, and all others there are: `model` computes as its base again, and what
    was learned is freed.

    The base stays in place, still read by leanlift: `load_adapter` puts an adapter on again.

    Raises:
        UserError: there is none on it.
    """
    layers = _loaded_layers(model)
    new = lift_state(model).base.new
    if new:
        raise UserError(
            f"{new[0]} is new, so there is no base to go back to: scale_adapter(model, 0) takes "
            "all else back and leaves it."
        )
    inner, state = lifted(model), lift_state(model)
    for layer in every_layer(inner).values():
        layer.shelf.clear()
    state.shelved.clear()
    state.active = DEFAULT
    base = live_base(inner, layers, layers)
    replace_modules(inner, layers_over(base.weights, {}, lift_state(model).workspace))
    drop_tokens(inner)
    return model


def scale_adapter(model: nn.Module, factor: float) -> nn.Module:
    """Multiply all offsets of the live model by `factor`; it is set, not accumulated.

    1 is the adapter as trained, 0 the base. The stored offsets are not changed; a head that the
    base has not stays as it is.

    Raises:
        UserError: no adapter is on the model, or the factor is no finite number.
    """
    layers = _loaded_layers(model)
    if not math.isfinite(factor):
        raise UserError(f"expected a finite factor such as 0.5, got {factor}.")
    for name, layer in layers.items():
        layer.scale = 1.0 if name in lift_state(model).base.new else float(factor)
    return model


def _loaded_layers(model: nn.Module) -> dict[str, LiftLinear]:
    lift_state(model)
    layers = lift_layers(model)
    if not layers:
        raise UserError(
            "the adapter of this model has been unloaded: load one with load_adapter first."
        )
    return layers


def _keep_samples(model: nn.Module, recorded: BaseFingerprint) -> None:
    """Let the model's fingerprint have an adapter's samples of its matrices, which it agrees
    with."""
    state = lift_state(model)
    ends = {name: text for name, text in state.base.samples.items() if name in state.base.sampled}
    own = {name: recorded.samples[name] for name in recorded.shapes if name in recorded.samples}
    state.base = replace(state.base, samples={**ends, **own}, new=recorded.new)


def _attach(
    model: nn.Module,
    adapter: Adapter,
    offsets: dict[str, LayerOffsets],
    base: LiveBase,
    progress: bool,
) -> None:
    indices = _indices(offsets, base)

    def choose(name: str, weight: FrozenWeight) -> Choice:
        return Choice(indices[name], converged=True)

    attach(
        model,
        adapter.config,
        base,
        choose,
        "Attaching",
        progress,
        sample=False,
        embedding_rows=None if adapter.grown is None else adapter.grown.rows,
    )


def _replace(
    model: nn.Module, adapter: Adapter, offsets: dict[str, LayerOffsets], base: LiveBase
) -> None:
    """Bring an attached model's layers to the modules and counts of `adapter`."""
    state, facts = lift_state(model), base.facts
    if state.ends_quantized and not adapter.config.quantize_embeddings:
        raise UserError(
            f"{adapter.directory} was trained over an embedding and head in 16 bits, but the model "
            "holds them in INT8: load the base again."
        )
    if adapter.grown is not None and state.embedding_rows is None:
        grow_embedding(model, adapter.grown.rows)
        state.embedding_rows = adapter.grown.rows
    if adapter.config.quantize_embeddings and not state.ends_quantized:
        facts = replace(facts, formats={**facts.formats, **quantize_embeddings(model)})
        state.ends_quantized = True
    dtype = getattr(torch, adapter.config.values_dtype)
    indices = _indices(offsets, base)
    for name, layer in every_layer(model).items():
        tokens = layer.tokens if isinstance(layer, LiftEmbedding) else None
        index = indices.get(name) if tokens is None else rows_index(tokens, layer.index.shape)
        there = layer.index.count, layer.values.dtype
        if layer.shelf and index is not None and there != (index.count, dtype):
            layer.put_on(Slot.zero(index, dtype))
    replace_modules(model, layers_over(base.weights, indices, state.workspace, dtype))
    state.base = facts
    if state.shelved:  # all adapters of a model have the same tokens
        return
    drop_tokens(model)
    if adapter.config.trainable_token_indices:
        lift_tokens(model, adapter.config.trainable_token_indices, state.workspace, dtype)


def _indices(offsets: dict[str, LayerOffsets], base: LiveBase) -> dict[str, SegmentedIndex]:
    """The active positions of every target, where its weight is."""
    return {
        name: learned.active.index.to(base.weights[name].device)
        for name, learned in offsets.items()
        if name in base.weights
    }
