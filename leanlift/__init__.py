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
    from leanlift.errors import Interrupted, MaskError, OutOfMemoryError, UserError
    from leanlift.export import MergeReport, PeftReport, export_peft, merge_adapter
    from leanlift.io.hub import push_to_hub
    from leanlift.layers.lm_head import Objective
    from leanlift.lift_model import (
        LiftModel,
        LiftPeftConfig,
        ReferenceModel,
        get_lift_model,
        load_adapter,
        reference_model,
    )
    from leanlift.model import (
        RefreshReport,
        quantize_experts,
        refresh_mask,
        save_adapter,
        scale_adapter,
        unload_adapter,
    )
    from leanlift.optim import SparseAdamW
    from leanlift.plan import Batch, Known, MemoryPlan, PlanSettings, Seen, plan_memory
    from leanlift.selection.scorers import RowScores, Scorer, ScorerBytes
    from leanlift.tiles import RowTiles
    from leanlift.training import LiftCallback, LiftSFTConfig, LiftTrainer, Steps, load_in_few_bits
    from leanlift.weights.quantized import WeightFormat

__all__ = [
    "Batch",
    "Interrupted",
    "Known",
    "LiftCallback",
    "LiftConfig",
    "LiftModel",
    "LiftPeftConfig",
    "LiftSFTConfig",
    "LiftTrainer",
    "MaskError",
    "MemoryPlan",
    "MergeReport",
    "Objective",
    "OutOfMemoryError",
    "PeftReport",
    "PlanSettings",
    "ReferenceModel",
    "RefreshReport",
    "RowScores",
    "RowTiles",
    "Scorer",
    "ScorerBytes",
    "Seen",
    "SparseAdamW",
    "Steps",
    "UserError",
    "WeightFormat",
    "__version__",
    "combine_adapters",
    "export_peft",
    "get_lift_model",
    "load_adapter",
    "load_in_few_bits",
    "merge_adapter",
    "plan_memory",
    "push_to_hub",
    "quantize_experts",
    "reference_model",
    "refresh_mask",
    "save_adapter",
    "scale_adapter",
    "unload_adapter",
]

_NAMES = {
    "leanlift.adapters": ("combine_adapters",),
    "leanlift.config": ("LiftConfig",),
    "leanlift.errors": (
        "Interrupted",
        "MaskError",
        "OutOfMemoryError",
        "UserError",
    ),
    "leanlift.export": (
        "MergeReport",
        "PeftReport",
        "export_peft",
        "merge_adapter",
    ),
    "leanlift.io.hub": ("push_to_hub",),
    "leanlift.layers.lm_head": ("Objective",),
    "leanlift.lift_model": (
        "LiftModel",
        "LiftPeftConfig",
        "ReferenceModel",
        "get_lift_model",
        "load_adapter",
        "reference_model",
    ),
    "leanlift.model": (
        "RefreshReport",
        "quantize_experts",
        "refresh_mask",
        "save_adapter",
        "scale_adapter",
        "unload_adapter",
    ),
    "leanlift.optim": ("SparseAdamW",),
    "leanlift.plan": (
        "Batch",
        "Known",
        "MemoryPlan",
        "PlanSettings",
        "Seen",
        "plan_memory",
    ),
    "leanlift.selection.scorers": ("RowScores", "Scorer", "ScorerBytes"),
    "leanlift.tiles": ("RowTiles",),
    "leanlift.training": (
        "LiftCallback",
        "LiftSFTConfig",
        "LiftTrainer",
        "Steps",
        "load_in_few_bits",
    ),
    "leanlift.weights.quantized": ("WeightFormat",),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'leanlift' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
