"""leanlift: fine-tune a 7B language model on one consumer GPU.

    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=...)  # stock
    model = get_lift_model(model, LiftConfig(density=0.05))
    LiftTrainer(model=model, args=LiftSFTConfig("run"), train_dataset=rows).train()
    save_adapter(model, "adapter")
    merge_adapter("adapter", "merged", dtype="float16")

The names below are imported when they are first used, so that `leanlift --help` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from leanlift._version import __version__

if TYPE_CHECKING:
    from leanlift.adapters import combine_adapters
    from leanlift.config import LiftConfig
    from leanlift.errors import UserError
    from leanlift.export import export_peft, merge_adapter
    from leanlift.io.hub import push_to_hub
    from leanlift.model import (
        get_lift_model,
        load_adapter,
        refresh_mask,
        save_adapter,
        scale_adapter,
        unload_adapter,
    )
    from leanlift.plan import MemoryPlan, PlanSettings, plan_memory
    from leanlift.training import LiftSFTConfig, LiftTrainer

__all__ = [
    "LiftConfig",
    "LiftSFTConfig",
    "LiftTrainer",
    "MemoryPlan",
    "PlanSettings",
    "UserError",
    "__version__",
    "combine_adapters",
    "export_peft",
    "get_lift_model",
    "load_adapter",
    "merge_adapter",
    "plan_memory",
    "push_to_hub",
    "refresh_mask",
    "save_adapter",
    "scale_adapter",
    "unload_adapter",
]

_HOMES = {
    "LiftConfig": "leanlift.config",
    "LiftSFTConfig": "leanlift.training",
    "LiftTrainer": "leanlift.training",
    "MemoryPlan": "leanlift.plan",
    "PlanSettings": "leanlift.plan",
    "UserError": "leanlift.errors",
    "combine_adapters": "leanlift.adapters",
    "export_peft": "leanlift.export",
    "get_lift_model": "leanlift.model",
    "load_adapter": "leanlift.model",
    "merge_adapter": "leanlift.export",
    "plan_memory": "leanlift.plan",
    "push_to_hub": "leanlift.io.hub",
    "refresh_mask": "leanlift.model",
    "save_adapter": "leanlift.model",
    "scale_adapter": "leanlift.model",
    "unload_adapter": "leanlift.model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'leanlift' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
