"""What is known about an attached model, and its layers by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from leanlift.config import LiftConfig
from leanlift.errors import UserError
from leanlift.fingerprint import BaseFingerprint
from leanlift.layers import FrozenLinear, LiftLinear, Scratch, Workspace

DEFAULT = "default"
"""The name of an adapter that got none, as in PEFT."""


@dataclass
class Facts:
    """What is known of one adapter beside what its layers hold.

    Attributes:
        config: the LiftConfig.
        base: the fingerprint of the base; its `shapes` name what the adapter trains.
        refreshes: mask refreshes so far.
        unconverged: targets whose selection had not converged when it was last made.
    """

    config: LiftConfig
    base: BaseFingerprint
    refreshes: int = 0
    unconverged: list[str] = field(default_factory=list)


@dataclass
class LiftState(Facts):
    """What leanlift knows about an attached model; `model.leanlift`. What `Facts` has is of the
    adapter that the model computes with.

    Attributes:
        workspace: what all layers share.
        ends_quantized: whether the embedding and the head are held in INT8.
        embedding_rows: of an embedding with more rows than the base's; None: it has those.
        selection_seconds: how long the first selection took.
        holds_merged: whether merged weights were made beside the bases, and not freed since.
        claimed: whether whoever trains the model knows what its config asks for.
        active: the name of the adapter that the model computes with.
        shelved: of other adapters on the model, by their names; what they have learned is in the
            shelves of the layers.
    """

    workspace: Workspace = field(default_factory=Workspace)
    ends_quantized: bool = False
    embedding_rows: int | None = None
    selection_seconds: float = 0.0
    holds_merged: bool = False
    claimed: bool = False
    active: str = DEFAULT
    shelved: dict[str, Facts] = field(default_factory=dict)

    @property
    def scratch(self) -> Scratch:
        """The buffer that all layers share."""
        return self.workspace.scratch


def lifted(model: Any) -> Any:
    """The model that layers were put into, under whatever is around it: a `LiftModel`, torch's
    DistributedDataParallel or what `torch.compile` made."""
    while True:
        if hasattr(type(model), "get_base_model"):
            model = model.get_base_model()
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in getattr(model, "_modules", ()):
            model = model._orig_mod
        else:
            return model


def lift_layers(model: nn.Module) -> dict[str, LiftLinear]:
    """The patched layers of a model that its adapter trains, by name, in model order."""
    return {name: layer for name, layer in every_layer(model).items() if layer.index.count}


def every_layer(model: nn.Module) -> dict[str, LiftLinear]:
    """The patched layers of a model by name, those too in which only other adapters train."""
    return {n: m for n, m in lifted(model).named_modules() if isinstance(m, LiftLinear)}


def lift_state(model: nn.Module) -> LiftState:
    """What leanlift knows about an attached model.

    Raises:
        UserError: nothing is attached.
    """
    model = lifted(model)
    state = getattr(model, "leanlift", None)
    if not isinstance(state, LiftState):
        raise UserError(
            f"this {type(model).__name__} has no leanlift layers: call "
            "get_lift_model(model, LiftConfig(...)) first."
        )
    return state


def weights_of(model: nn.Module) -> tuple[int, int]:
    """Trained entries of an attached model, and its weights in all."""
    model = lifted(model)
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
