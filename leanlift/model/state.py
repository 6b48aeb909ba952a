"""What is known about an attached model, and its layers by name."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from leanlift.config import LiftConfig
from leanlift.errors import UserError
from leanlift.fingerprint import BaseFingerprint
from leanlift.layers import FrozenLinear, LiftLinear, Scratch, Workspace


@dataclass
class LiftState:
    """What leanlift knows about an attached model; `model.leanlift`.

    Attributes:
        config: the LiftConfig.
        base: the fingerprint of the base.
        workspace: what all layers share.
        refreshes: mask refreshes so far.
        ends_quantized: whether the embedding and the head are held in INT8.
        embedding_rows: of an embedding with more rows than the base's; None: it has those.
        unconverged: targets whose selection had not converged when it was last made.
        selection_seconds: how long the first selection took.
        claimed: whether whoever trains the model knows what its config asks for.
    """

    config: LiftConfig
    base: BaseFingerprint
    workspace: Workspace
    refreshes: int = 0
    ends_quantized: bool = False
    embedding_rows: int | None = None
    unconverged: list[str] = field(default_factory=list)
    selection_seconds: float = 0.0
    claimed: bool = False

    @property
    def scratch(self) -> Scratch:
        """The buffer that all layers share."""
        return self.workspace.scratch


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
