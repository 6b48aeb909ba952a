"""What `get_lift_model` returns: an adapter model as PEFT has them, for every trainer that knows
those."""

from leanlift.lift_model.attached import get_lift_model, load_adapter
from leanlift.lift_model.config import LiftPeftConfig
from leanlift.lift_model.lift_model import LiftModel
from leanlift.lift_model.reference import ReferenceModel, reference_model

__all__ = [
    "LiftModel",
    "LiftPeftConfig",
    "ReferenceModel",
    "get_lift_model",
    "load_adapter",
    "reference_model",
]
