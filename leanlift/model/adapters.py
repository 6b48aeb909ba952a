"""Adapters on a live model: save, load, switch, scale, unload, without touching the base."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from leanlift.adapter import (
    Adapter,
    LayerOffsets,
    Store,
    check_values,
    open_adapter,
    write_adapter,
)
from leanlift.cells import Cells, cells_of
from leanlift.errors import UserError
from leanlift.fingerprint import (
    BaseFingerprint,
    check_same_base,
    fingerprint,
    other_matrix,
    with_samples,
)
from leanlift.grown import Grown
from leanlift.layer import FrozenLinear, LiftLinear
from leanlift.model.attach import (
    Choice,
    LiftState,
    attach,
    lift_layers,
    lift_state,
)
from leanlift.model.base import base_dtype, base_name, base_revision, checkpoint_of
from leanlift.model.embedding import (
    embedding_size,
    grow_embedding,
    head_name,
    rows_to_grow_to,
)
from leanlift.model.ends import quantize_ends
from leanlift.model.targets import inside_blocks
from leanlift.quantized import FrozenWeight, WeightFormat, dtype_of, frozen_weight
from leanlift.samples import Comparison
from leanlift.source import check_homes, stored_cells
from leanlift.special import SpecialTokens


def save_adapter(model: nn.Module, directory: str | Path) -> None:
    """Write the adapter of `model`: positions, offsets, retired entries, config, fingerprint.

    Raises:
        UserError: nothing is attached to the model, or its offsets are scaled or not finite; what
            stood in `directory` stays.
    """
    state = lift_state(model)
    layers = _loaded_layers(model)
    scale = next(iter(layers.values())).scale
    if scale != 1:
        raise UserError(
            f"the adapter is scaled by {scale:g}, which a saved one cannot be: call "
            "scale_adapter(model, 1.0) first, and multiply the saved one with "
            f"leanlift combine --weights {scale:g}."
        )
    offsets = {name: _offsets(layer) for name, layer in layers.items()}
    for name, learned in offsets.items():  # what could not be loaded again is not written
        for store in learned.stores:
            check_values(store.values, layers[name].values.dtype, f"{name}.values of this model")
    special = SpecialTokens.of(*_configs(model))
    grown = None
    if state.embedding_rows is not None:
        grown = Grown(state.embedding_rows, head_name(model))
    write_adapter(
        Path(directory), offsets, state.config, state.base, state.refreshes, special, grown
    )


def _configs(model: nn.Module) -> tuple[Any, Any]:
    """A model's configurations of its text part and of generation; None where it has none."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return text, getattr(model, "generation_config", None)


def _check_checkpoint(adapter: Adapter, base: BaseFingerprint) -> None:
    """Compare an adapter with the checkpoint that a model was loaded from, where that is at hand:
    it tells more exactly than quantized weights can.

    Raises:
        UserError: it is of another base.
    """
    checkpoint, comparison = checkpoint_of(base), Comparison()
    if checkpoint is None:
        return
    check_homes(base, checkpoint)
    with stored_cells(checkpoint, dtype_of(base.dtype)) as stored:
        other = other_matrix(adapter.base, stored, comparison)
    if other or comparison.is_other:
        raise UserError(
            f"this adapter was trained on {adapter.base.name}; the loaded model ({base.name}) has "
            f"the same shapes but other weights{f' in {other}' if other else ''}: load the "
            "adapter's own base."
        )


def _check_special(adapter: Adapter, model: nn.Module) -> None:
    """Refuse ids that the model has no embedding for: generation would pad with them."""
    size = getattr(_configs(model)[0], "vocab_size", None)
    if adapter.grown is not None:
        size = adapter.grown.rows
    if isinstance(size, int) and adapter.special.largest >= size:
        raise UserError(
            f"{adapter.directory} says that it was trained with a special token "
            f"{adapter.special.largest}, but the model's vocabulary has {size}: the adapter is "
            "damaged."
        )


def _check_rows(model: nn.Module, adapter: Adapter) -> None:
    """Refuse an adapter whose embedding has another number of rows than the model has, or can get.

    Rows beyond the adapter's would answer to tokens that it does not know.
    """
    grown, state = adapter.grown, getattr(model, "leanlift", None)
    if grown is not None and grown.head != head_name(model):
        raise UserError(
            f"{adapter.directory} says that the output head is {grown.head}, but the model's is "
            f"{head_name(model)}: the adapter is damaged."
        )
    if isinstance(state, LiftState) and state.embedding_rows is not None:
        _check_same_rows(adapter, state)
    elif grown is not None:
        grown.check(embedding_size(model), str(adapter.directory))
        rows_to_grow_to(model, grown.rows)


def _check_same_rows(adapter: Adapter, state: LiftState) -> None:
    wanted = None if adapter.grown is None else adapter.grown.rows
    if wanted != state.embedding_rows:
        one, two = (
            f"{rows} rows" if rows is not None else "the base's rows"
            for rows in (wanted, state.embedding_rows)
        )
        raise UserError(
            f"{adapter.directory} was trained with {one} in the embedding, but the model has "
            f"{two}: load the base again, and the adapter into it."
        )


def _offsets(layer: LiftLinear) -> LayerOffsets:
    retired = None
    if layer.retired_index is not None and layer.retired_values is not None:
        retired = Store(layer.retired_index, layer.retired_values)
    return LayerOffsets(Store(layer.index, layer.values.detach()), retired)


def load_adapter(model: nn.Module, source: str | Path, progress: bool = False) -> nn.Module:
    """Load an adapter into `model`, in place; returns the same object.

    A stock model gets its layers patched at the adapter's positions, without a new selection. On a
    model that leanlift has attached to already, the adapter takes the place of the present one,
    whatever modules and budgets either has: that is how to switch. Where a matrix trains as many
    entries as before, its Parameter object stays, so an optimizer that knows it goes on working.

    Args:
        model: the adapter's base, in the format that it was trained over.
        source: a directory or hub name; leanlift's own form or PEFT's SHiRA.
        progress: whether to show a bar over the matrices.

    Raises:
        UserError: a damaged adapter, or one of another base. The model is unchanged then.
    """
    with open_adapter(source, lambda names: _sampled_base(model, names)) as adapter:
        base = _live_base(model, list(adapter.base.shapes))
        # before anything of the claimed shapes is made
        check_same_base(adapter.base, base, partial(_weight, model))
        _check_checkpoint(adapter, base)
        _check_special(adapter, model)
        _check_rows(model, adapter)
        offsets = adapter.layers()
        if hasattr(model, "leanlift"):
            _replace(model, adapter, offsets, base)
        else:
            _attach(model, adapter, offsets, progress)
        _keep_samples(model, adapter.base)
        for name, layer in lift_layers(model).items():
            _put(layer, offsets[name])
        state = lift_state(model)
        state.config, state.refreshes = adapter.config, adapter.refreshes
        adapter.special.put(*_configs(model))
    return model


def restore_adapter(model: nn.Module, directory: str | Path) -> None:
    """Put a saved adapter back into the layers that are there, for a run that goes on.

    Every Parameter object stays.

    Raises:
        UserError: a damaged adapter, one of another base, or one with other modules, counts or
            dtype than the model trains. The model is unchanged then.
    """
    state, layers = lift_state(model), lift_layers(model)
    with open_adapter(directory) as adapter:
        check_same_base(adapter.base, state.base, partial(_weight, model))
        _check_same_rows(adapter, state)
        if adapter.config.values_dtype != state.config.values_dtype:
            raise UserError(
                f"{directory} has {adapter.config.values_dtype} offsets, but the model trains "
                f"{state.config.values_dtype} ones: use the values_dtype that it was made with."
            )
        offsets = adapter.layers()
        for name, layer in layers.items():
            if name not in offsets or offsets[name].active.index.count != layer.index.count:
                found = offsets[name].active.index.count if name in offsets else "no"
                raise UserError(
                    f"{directory} has {found} entries for {name}, but the model trains "
                    f"{layer.index.count}: use the budget and targets that the adapter was made "
                    "with."
                )
        for name, layer in layers.items():
            _put(layer, offsets[name])
        state.config, state.refreshes = adapter.config, adapter.refreshes


def unload_adapter(model: nn.Module) -> nn.Module:
    """Take the adapter off: `model` computes as its base again, and its offsets are freed.

    The base stays in place, still read by leanlift: `load_adapter` puts an adapter on again.

    Raises:
        UserError: there is none on it.
    """
    for name, layer in _loaded_layers(model).items():
        model.set_submodule(name, FrozenLinear(layer.base, layer.weight_tiles, layer.scratch))
    return model


def scale_adapter(model: nn.Module, factor: float) -> nn.Module:
    """Multiply all offsets of the live model by `factor`; it is set, not accumulated.

    1 is the adapter as trained, 0 the base. The stored offsets are not changed.

    Raises:
        UserError: no adapter is on the model, or the factor is no finite number.
    """
    layers = _loaded_layers(model)
    if not math.isfinite(factor):
        raise UserError(f"expected a finite factor such as 0.5, got {factor}.")
    for layer in layers.values():
        layer.scale = float(factor)
    return model


def _loaded_layers(model: nn.Module) -> dict[str, LiftLinear]:
    lift_state(model)
    layers = lift_layers(model)
    if not layers:
        raise UserError(
            "the adapter of this model has been unloaded: load one with load_adapter first."
        )
    return layers


def _live_base(model: nn.Module, targets: list[str]) -> BaseFingerprint:
    """The fingerprint of a model, stock or attached, for these targets; those it lacks are left
    out."""
    modules = dict(model.named_modules())
    state = getattr(model, "leanlift", None)
    if not isinstance(state, LiftState):
        inside = set(inside_blocks(modules))
        found = [name for name in targets if name in inside]
        return fingerprint(model, base_name(model), base_dtype(model), found, base_revision(model))
    inside = {name for name in inside_blocks(modules) if not _is_in_a_layer(name, modules)}
    read = {name: _weight(model, name) for name in targets if name in inside}
    return replace(
        state.base,
        shapes={name: weight.shape for name, weight in read.items()},
        formats=_formats({name: weight.format for name, weight in read.items()}, state, modules),
    )


def _formats(
    targets: dict[str, WeightFormat], state: LiftState, modules: dict[str, nn.Module]
) -> dict[str, WeightFormat]:
    """The formats of these targets and of all that is quantized, in the order in which they are
    found on a stock model: targets, the other Linears, the two ends."""
    quantized = {name: fmt for name, fmt in state.base.formats.items() if fmt.kind != "dense"}
    linears = [name for name, module in modules.items() if isinstance(module, FrozenLinear)]
    order = [*targets, *linears, *quantized]
    return {name: targets.get(name) or quantized[name] for name in order
            if name in targets or name in quantized}  # fmt: skip


def _is_in_a_layer(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a module is the base inside a layer of ours, which no stock model has."""
    return isinstance(modules[name.rpartition(".")[0]], FrozenLinear)


def _weight(model: nn.Module, name: str) -> FrozenWeight:
    """The frozen weight of a module of a stock model, or under a layer of an attached one."""
    module = model.get_submodule(name)
    return frozen_weight(module.base if isinstance(module, FrozenLinear) else module, name)  # type: ignore[arg-type]


def _sampled_base(model: nn.Module, targets: list[str]) -> BaseFingerprint:
    """The fingerprint of a model with samples of these targets, for an adapter that says nothing
    of its base."""
    base = _live_base(model, targets)
    none = partial(torch.empty, 0, dtype=torch.int64)
    dtype = dtype_of(base.dtype)

    def read(name: str, flat: torch.Tensor) -> Cells:
        return cells_of(_weight(model, name), flat, dtype)

    return with_samples(base, dict.fromkeys(base.shapes, none), read)


def _keep_samples(model: nn.Module, recorded: BaseFingerprint) -> None:
    """Let the model's fingerprint have an adapter's samples of its matrices, which it agrees
    with."""
    state = lift_state(model)
    ends = {name: text for name, text in state.base.samples.items() if name in state.base.sampled}
    own = {name: recorded.samples[name] for name in recorded.shapes if name in recorded.samples}
    state.base = replace(state.base, samples={**ends, **own})


def _attach(
    model: nn.Module, adapter: Adapter, offsets: dict[str, LayerOffsets], progress: bool
) -> None:
    def choose(name: str, weight: FrozenWeight) -> Choice:
        index = offsets[name].active.index.map(lambda tensor: tensor.to(weight.device))
        return Choice(index, converged=True)

    order = [name for name, _ in model.named_modules() if name in adapter.base.shapes]
    attach(
        model,
        adapter.config,
        order,
        choose,
        "Attaching",
        progress,
        lambda base: None,
        sample=False,
        embedding_rows=None if adapter.grown is None else adapter.grown.rows,
    )


def _replace(
    model: nn.Module, adapter: Adapter, offsets: dict[str, LayerOffsets], base: BaseFingerprint
) -> None:
    """Bring an attached model's layers to the modules and counts of `adapter`."""
    state, modules = lift_state(model), dict(model.named_modules())
    if state.ends_quantized and not adapter.config.quantize_ends:
        raise UserError(
            f"{adapter.directory} was trained over an embedding and head in 16 bits, but the model "
            "holds them in INT8: load the base again."
        )
    if adapter.grown is not None and state.embedding_rows is None:
        grow_embedding(model, adapter.grown.rows)
        state.embedding_rows = adapter.grown.rows
    if adapter.config.quantize_ends and not state.ends_quantized:
        base = replace(base, formats={**base.formats, **quantize_ends(model)})
        state.ends_quantized = True
    dtype = getattr(torch, adapter.config.values_dtype)
    for name in lift_layers(model):
        if name not in offsets:
            weight = _weight(model, name)
            model.set_submodule(
                name, FrozenLinear(_base_module(modules[name]), weight, state.scratch)
            )
    for name, learned in offsets.items():
        module, count = modules[name], learned.active.index.count
        fits = isinstance(module, LiftLinear) and module.index.count == count
        if fits and module.values.dtype == dtype:  # type: ignore[union-attr]
            continue
        weight = _weight(model, name)
        index = learned.active.index.map(partial(torch.Tensor.to, device=weight.device))
        layer = LiftLinear(_base_module(module), weight, index, state.scratch, dtype)
        layer.train(module.training)
        model.set_submodule(name, layer)
    state.base = base


def _base_module(module: nn.Module) -> nn.Module:
    return module.base if isinstance(module, FrozenLinear) else module


@torch.no_grad()
def _put(layer: LiftLinear, offsets: LayerOffsets) -> None:
    device = layer.values.device
    layer.index = offsets.active.index.map(lambda tensor: tensor.to(device))
    layer.values.copy_(offsets.active.values)
    layer.scale = 1.0
    retired = offsets.retired
    if retired is None:
        layer.set_retired(torch.empty(0, dtype=torch.int64), torch.empty(0))
    else:
        layer.set_retired(retired.index.to_flat().to(device), retired.values)
