"""Linears that are trained whole: PEFT's `modules_to_save`.

A classifier or reward head, the output head: what is new or small enough that nothing need be
chosen. Such a Linear is a target like others, all of whose entries are in the mask, so everything
that holds for targets holds for it. It may lie outside the blocks, and a refresh passes it by.

One that the checkpoint has not, as the head of a classifier over a language model, begins with
numbers of its own that no other process has. Its base is taken for zero, and what it began with for
its first offsets: so the adapter has the whole of it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from leanlift.config import LiftConfig
from leanlift.errors import MaskError, UserError
from leanlift.layers import FrozenExperts, FrozenLinear, LiftLinear
from leanlift.model.embeddings import embeddings_tied
from leanlift.model.reading import read_by_parent
from leanlift.model.resize_embeddings import head_name, rows_to_grow_to
from leanlift.model.stacks import named_parts
from leanlift.model.state import lift_layers
from leanlift.model.targets import ends_in
from leanlift.weights.kinds import is_dense_linear
from leanlift.weights.quantized import is_quantized


def whole_modules(model: nn.Module, config: LiftConfig) -> list[str]:
    """Names of the Linears that `modules_to_save` means, in model order.

    Raises:
        MaskError: a name that means nothing here, or something that is no Linear of its own.
    """
    names, kind = named_parts(model), type(model).__name__
    found = {end: [n for n in names if ends_in(n, end)] for end in config.modules_to_save}
    nothing = [end for end, means in found.items() if not means]
    if nothing:
        last = [name for name, module in names.items() if is_linear(module)][-1:]
        raise MaskError(
            f"modules_to_save={nothing} matches nothing in this {kind}; its last Linear is "
            f"{', '.join(last) or 'none'}."
        )
    means = {name for named in found.values() for name in named}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for name in means:
        if not is_linear(names[name]):
            raise MaskError(
                f"modules_to_save={name} is a {type(names[name]).__name__}: leanlift trains whole "
                "Linears alone; of an embedding, tokens, with trainable_token_indices."
            )
        if names[name] is head and embeddings_tied(model):
            raise MaskError(
                f"{name} is tied to the embedding, so it is not trained alone: leave it out of "
                "modules_to_save, and train tokens with trainable_token_indices."
            )
        if names[name] is head and config.quantize_embeddings:
            raise MaskError(
                f"{name} cannot be trained whole and held in INT8: leave out quantize_embeddings, "
                "or modules_to_save."
            )
        if read_by_parent(names, name):
            raise MaskError(
                f"the weight of {name} is read past any layer in its place, so it would be trained "
                "nowhere: leave it out of modules_to_save."
            )
    return [name for name in names if name in means]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one that can be trained whole, in any format, or a layer over one."""
    over = isinstance(module, FrozenLinear) and not isinstance(module, FrozenExperts)
    return over or is_dense_linear(module) or is_quantized(module)


def check_growth_beside(model: nn.Module, whole: Iterable[str], rows: int | None) -> None:
    """Refuse a larger vocabulary under a head that is trained whole.

    Raises:
        UserError: it is wanted.
    """
    if rows_to_grow_to(model, rows) is not None and head_name(model) in whole:
        raise UserError(
            f"the vocabulary grows to {rows} rows, and {head_name(model)} is in modules_to_save: "
            "leanlift trains no head of which the base has a part alone; leave it out, or save "
            "the base with its new rows first (resize_token_embeddings, save_pretrained)."
        )


def check_new(model: nn.Module, new: Iterable[str]) -> None:
    """Refuse a new Linear with a bias, of which nothing would be kept.

    Raises:
        UserError: one has one.
    """
    for name in new:
        if getattr(model.get_submodule(name), "bias", None) is not None:
            raise UserError(
                f"{name} is new, its checkpoint has nothing of it, and it has a bias, which is not "
                "trained and would be lost: make it without a bias."
            )


@torch.no_grad()
def begin(model: nn.Module, new: Iterable[str]) -> None:
    """Let attached Linears that are new have what they hold as offsets, over a base of zeros."""
    layers = lift_layers(model)
    for name in new:
        layer = layers[name]
        layer.values.copy_(layer.base.weight.reshape(-1))  # type: ignore[operator,arg-type]
        empty(layer)


@torch.no_grad()
def empty(layer: LiftLinear) -> None:
    """Let the base of a new Linear be zero."""
    layer.is_new = True
    layer.base.weight.zero_()  # type: ignore[operator,union-attr]
