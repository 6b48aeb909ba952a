"""A whole model: attach, refresh, save, load."""

from leanlift.model.adapters import load_adapter, save_adapter
from leanlift.model.attach import LiftState, get_lift_model, lift_layers, lift_state
from leanlift.model.refresh import RefreshReport, refresh_mask

__all__ = [
    "LiftState",
    "RefreshReport",
    "get_lift_model",
    "lift_layers",
    "lift_state",
    "load_adapter",
    "refresh_mask",
    "save_adapter",
]
