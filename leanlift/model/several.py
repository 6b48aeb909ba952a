"""Several adapters on one base, by name, of which the model computes with one.

What an adapter has learned in a layer is a slot (`layers.slot`): the one that computes is on the
layer, the others lie in its shelf. To switch exchanges them; no tensor is copied or moved. A layer
that an adapter does not train has an empty slot for it.

What is not in slots all adapters of a model share: the rows of its embedding, whether embedding and
head are held in INT8, which tokens are trained, which heads are new.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from leanlift.adapters import open_adapter
from leanlift.adapters.combine import joined_base, sum_of
from leanlift.config import LiftConfig
from leanlift.errors import MaskError, UserError
from leanlift.layers import FrozenExperts, FrozenLinear, LiftEmbedding, LiftLinear
from leanlift.layers.slot import Slot
from leanlift.layers.tokens import rows_index
from leanlift.model.adapters import check_unscaled, load_adapter
from leanlift.model.attach import choose_in
from leanlift.model.base import checkpoint_of, live_base, with_base_samples
from leanlift.model.state import Facts, LiftState, every_layer, lift_state, lifted
from leanlift.model.surgery import layers_over, replace_modules
from leanlift.model.targets import find_targets
from leanlift.sparse import SegmentedIndex

FACTS = [one.name for one in fields(Facts)]


def adapter_names(model: nn.Module) -> list[str]:
    """The adapters of a model, the one that it computes with first."""
    state = lift_state(model)
    return [state.active, *state.shelved]


def facts_of(model: nn.Module, name: str) -> Facts:
    """What is known of an adapter of a model.

    Raises:
        UserError: it has none of that name.
    """
    state = lift_state(model)
    if name not in adapter_names(model):
        raise UserError(
            f"there is no adapter {name!r} on this model: it has {', '.join(adapter_names(model))}."
        )
    return _own(state) if name == state.active else state.shelved[name]


def learned_names(model: nn.Module) -> list[str]:
    """The adapters of a model that train or have trained something, in the order of their names:
    a copy of one that had learned nothing has not, and is the base."""
    active = lift_state(model).active
    layers = every_layer(model).values()
    found = {name for layer in layers for name in layer.shelf if layer.shelf[name].index.count}
    if any(layer.index.count for layer in layers):
        found.add(active)
    return sorted(found)


def check_saved(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse to save adapters of which one is not there, or turned up or down.

    Raises:
        UserError: there is such a one.
    """
    for name in names:
        facts_of(model, name)
        for slot in _slots(model, name).values():
            check_unscaled(slot.scale)


def set_adapter(model: nn.Module, name: str) -> None:
    """Let a model compute with, and train, another one of its adapters.

    Raises:
        UserError: it has none of that name.
    """
    state = lift_state(model)
    facts_of(model, name)
    if name != state.active:
        _put_away(model)
        _take_out(model, name)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Take an adapter off a model, and free what it has learned; if it was the one that the model
    computes with, the next takes its place.

    Raises:
        UserError: there is none of that name, or no other.
    """
    state = lift_state(model)
    facts_of(model, name)
    if not state.shelved:
        raise UserError(
            f"{name} is the only adapter of this model: unload_adapter(model) takes it off."
        )
    if name == state.active:
        set_adapter(model, next(iter(state.shelved)))
    for layer in every_layer(model).values():
        layer.shelf.pop(name, None)
    del state.shelved[name]


def copy_adapter(model: nn.Module, name: str, new: str) -> None:
    """Keep what an adapter has learned so far under a new name, frozen. It shares positions with
    the other, and takes no memory where that has learned nothing yet."""
    state = lift_state(model)
    _check_name(model, new)
    facts, found = facts_of(model, name), _slots(model, name)
    if not all(slot.is_zero for slot in found.values()):  # else it is the base, and needs nothing
        for layer, slot in found.items():
            layer.shelf[new] = slot.copy()
    state.shelved[new] = replace(facts)


def add_adapter(model: nn.Module, name: str, config: LiftConfig, progress: bool = False) -> None:
    """Select positions for one more adapter, from the base; the model goes on computing with the
    one that it has.

    Raises:
        UserError: the name is taken, the config differs from the others' in what all share, or asks
            for a selection by gradient; or as for `get_lift_model`.
    """
    model = lifted(model)
    state = lift_state(model)
    _check_name(model, name)
    _check_shared(config, state.config, f"adapter {name!r}")
    if config.selector == "gradient" or config.modules_to_save:
        raise MaskError(
            "one more adapter is selected from the base alone, and has no modules_to_save: use "
            'selector="principal", "magnitude" or "random", or attach it to a base of its own.'
        )
    with _stock(model):
        targets = find_targets(model, config.target_modules, config.exclude_modules, config.selects)
        config.check_patterns(targets, [])
    base = live_base(model, targets)
    choices = choose_in(model, base, config, progress)
    indices = {target: choice.index for target, choice in choices.items()}
    facts = with_base_samples(base, indices, checkpoint_of(base.facts))
    known = {*facts.sampled, *targets}
    facts = replace(facts, samples={n: t for n, t in facts.samples.items() if n in known})
    unconverged = [target for target, choice in choices.items() if not choice.converged]
    with _aside(model, name):
        _wear(model, base.weights, indices, config)
        _keep(state, Facts(config, facts, unconverged=unconverged))


def load_beside(model: nn.Module, source: str | Path, name: str, progress: bool = False) -> None:
    """Load an adapter under a name; if that is taken, in the place of the one that has it. The
    model goes on computing with the one that it has.

    Raises:
        UserError: as for `load_adapter`, or the adapter differs from the others in what all share.
    """
    model = lifted(model)
    state, before = lift_state(model), lift_state(model).active
    if name == before:
        load_adapter(model, source, progress)
    elif name in state.shelved:
        set_adapter(model, name)
        try:
            load_adapter(model, source, progress)
        finally:
            set_adapter(model, before)
    else:
        _check_name(model, name)
        with open_adapter(source) as adapter:
            _check_shared(adapter.config, state.config, str(source))
            rows = None if adapter.grown is None else adapter.grown.rows
            if rows != state.embedding_rows or adapter.base.new != state.base.new:
                raise UserError(
                    f"{source} has other rows of the embedding or other new heads than "
                    f"{before!r} on this model: load it into a base of its own."
                )
        with _aside(model, name):
            load_adapter(model, source, progress)


def add_weighted_adapter(
    model: nn.Module, adapters: Sequence[str], weights: Sequence[float], name: str
) -> None:
    """Make one more adapter, the weighted sum of some of a model's.

    Raises:
        UserError: an adapter that is not there, a name that is taken, or weights that are not one
            finite number per adapter.
    """
    model = lifted(model)
    state = lift_state(model)
    _check_name(model, name)
    facts = [facts_of(model, one) for one in adapters]
    if not facts or len(weights) != len(facts):
        raise UserError(f"expected a weight for each of {list(adapters)}, got {list(weights)}.")
    slots, totals = [_slots(model, one) for one in adapters], {}
    for path, layer in every_layer(model).items():
        stores = [one[layer].learned.stores if layer in one else () for one in slots]
        if any(stores):
            totals[layer] = Slot.frozen(sum_of(path, layer.index.shape, stores, weights))
    for layer, total in totals.items():  # all of them, or none
        layer.shelf[name] = total
    config = replace(facts[0].config, values_dtype="float32")
    state.shelved[name] = Facts(config, joined_base([one.base for one in facts]))


def _slots(model: nn.Module, name: str) -> dict[LiftLinear, Slot]:
    """What an adapter of a model has, by layer."""
    layers = every_layer(model).values()
    if name == lift_state(model).active:
        return {layer: layer.worn for layer in layers if layer.index.count}
    return {layer: layer.shelf[name] for layer in layers if name in layer.shelf}


@contextmanager
def _aside(model: Any, name: str) -> Iterator[None]:
    """Let what is put on the layers meanwhile be the adapter `name`; nothing, if it fails."""
    state = lift_state(model)
    before = state.active
    _put_away(model)
    state.active = name
    try:
        yield
    except BaseException:
        _drop(model)
        _take_out(model, before)
        raise
    _put_away(model)
    _take_out(model, before)


def _put_away(model: nn.Module) -> None:
    """Put the adapter that a model computes with into the shelves."""
    state = lift_state(model)
    for layer in every_layer(model).values():
        if layer.index.count:
            layer.shelf[state.active] = layer.take_off()
    state.shelved[state.active] = _own(state)


def _take_out(model: nn.Module, name: str) -> None:
    """Put an adapter from the shelves onto the layers, which have none on."""
    state = lift_state(model)
    for layer in every_layer(model).values():
        if name in layer.shelf:
            layer.put_on(layer.shelf.pop(name))
    state.active = name
    _keep(state, state.shelved.pop(name))


def _drop(model: nn.Module) -> None:
    """Leave nothing of the adapter that is on the layers."""
    for layer in every_layer(model).values():
        if layer.index.count:
            layer.take_off()


def _wear(
    model: nn.Module,
    weights: Mapping[str, Any],
    indices: Mapping[str, SegmentedIndex],
    config: LiftConfig,
) -> None:
    """Put empty offsets at positions onto the layers, which have none on."""
    dtype, state = getattr(torch, config.values_dtype), lift_state(model)
    for name, layer in every_layer(model).items():
        if isinstance(layer, LiftEmbedding):
            layer.put_on(Slot.zero(rows_index(layer.tokens, layer.index.shape), dtype))
        elif name in indices:
            layer.put_on(Slot.zero(indices[name], dtype))
    replace_modules(model, layers_over(weights, indices, state.workspace, dtype))


@contextmanager
def _stock(model: nn.Module) -> Iterator[None]:
    """A model with its own Linears again, for a look at them."""

    def own(name: str, module: nn.Module) -> nn.Module | None:
        is_linear = isinstance(module, FrozenLinear) and not isinstance(module, FrozenExperts)
        return module.base if is_linear and name in linears else None  # type: ignore[union-attr,return-value]

    linears = {name for name, layer in model.named_modules() if isinstance(layer, FrozenLinear)
               and isinstance(layer.base, nn.Module)}  # fmt: skip
    replaced = replace_modules(model, own)
    try:
        yield
    finally:
        replace_modules(model, lambda name, _: replaced.get(name))


def _own(state: LiftState) -> Facts:
    return Facts(**{name: getattr(state, name) for name in FACTS})


def _keep(state: LiftState, facts: Facts) -> None:
    for name in FACTS:
        setattr(state, name, getattr(facts, name))


def _check_name(model: nn.Module, name: str) -> None:
    if name in adapter_names(model) or not name or set(name) & set("./\\"):
        raise UserError(
            f"expected a new name for an adapter, without dots and slashes, got {name!r}; those "
            f"there are: {', '.join(adapter_names(model))}."
        )


def _check_shared(config: LiftConfig, own: LiftConfig, what: str) -> None:
    """Refuse a config that differs in what all adapters of a model share."""
    for key in ("quantize_embeddings", "trainable_token_indices", "modules_to_save"):
        theirs, ours = getattr(config, key), getattr(own, key)
        if theirs != ours:
            raise UserError(
                f"{what} has {key}={theirs!r}, and the adapters of this model have {ours!r}, which "
                "they share: attach it to a base of its own."
            )
