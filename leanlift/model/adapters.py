"""Saving what a live model has learned, and putting it back."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from leanlift.adapter import Adapter, LayerOffsets, open_adapter, write_adapter
from leanlift.errors import UserError
from leanlift.fingerprint import check_same_base
from leanlift.layer import LiftLinear
from leanlift.model.attach import Choice, attach, lift_layers, lift_state
from leanlift.quantized import FrozenWeight


def save_adapter(model: nn.Module, directory: str | Path) -> None:
    """Write the adapter of `model`: positions, offsets, settled entries, config, fingerprint.

    Raises:
        UserError: nothing is attached to the model.
    """
    state = lift_state(model)
    write_adapter(Path(directory), lift_layers(model), state.config, state.base, state.refreshes)


def load_adapter(model: nn.Module, directory: str | Path, progress: bool = False) -> nn.Module:
    """Load an adapter into `model`, in place; returns the same object.

    A stock model gets its layers patched at the adapter's positions, without a new selection. A
    model that is patched already has its offsets and positions replaced; Parameter objects stay,
    so an optimizer built before goes on working.

    Raises:
        UserError: a damaged adapter, or one of another base. The model is unchanged then.
    """
    with open_adapter(directory) as adapter:
        offsets = {name: adapter.layer(name) for name in adapter.base.shapes}
        if not lift_layers(model):
            _attach_empty(model, adapter, offsets, progress)
        state = lift_state(model)
        layers = lift_layers(model)
        check_same_base(adapter.base, state.base)
        if adapter.config.values_dtype != state.config.values_dtype:
            raise UserError(
                f"{directory} has {adapter.config.values_dtype} offsets, but the model trains "
                f"{state.config.values_dtype} ones: load it into the base instead."
            )
        _check_counts(layers, offsets, directory)
        for name, layer in layers.items():
            _put(layer, offsets[name])
        state.config, state.refreshes = adapter.config, adapter.refreshes
    return model


def _attach_empty(
    model: nn.Module, adapter: Adapter, offsets: dict[str, LayerOffsets], progress: bool
) -> None:
    def choose(name: str, weight: FrozenWeight) -> Choice:
        index = offsets[name].active.index.map(lambda tensor: tensor.to(weight.device))
        return Choice(index, converged=True)

    attach(
        model,
        adapter.config,
        choose,
        "Attaching",
        progress,
        accept=lambda base: check_same_base(adapter.base, base),
    )


def _check_counts(
    layers: dict[str, LiftLinear], offsets: dict[str, LayerOffsets], directory: str | Path
) -> None:
    for name, layer in layers.items():
        if name not in offsets or offsets[name].active.index.count != layer.index.count:
            found = offsets[name].active.index.count if name in offsets else "no"
            raise UserError(
                f"{directory} has {found} entries for {name}, but the model trains "
                f"{layer.index.count}: use the budget and targets that the adapter was made with."
            )


@torch.no_grad()
def _put(layer: LiftLinear, offsets: LayerOffsets) -> None:
    device = layer.values.device
    layer.index = offsets.active.index.map(lambda tensor: tensor.to(device))
    layer.values.copy_(offsets.active.values)
    settled = offsets.settled
    if settled is None:
        layer.set_settled(torch.empty(0, dtype=torch.int64), torch.empty(0))
    else:
        layer.set_settled(settled.index.to_flat().to(device), settled.values)
