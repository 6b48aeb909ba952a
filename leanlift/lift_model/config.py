"""What PEFT's tools read of an adapter's configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from leanlift.config import LiftConfig

PEFT_TYPE = "LEANLIFT"
"""PEFT loads the kinds in its own registry alone; `LiftModel` loads ours."""


@dataclass
class LiftPeftConfig(PeftConfig):
    """A `LiftConfig` in the place where PEFT's tools look for theirs.

    Attributes:
        lift: the configuration. It is not copied into the fields of PEFT's own.
    """

    peft_type: Any = PEFT_TYPE
    lift: LiftConfig = field(default_factory=LiftConfig)

    def __post_init__(self) -> None:
        """Nothing of what PEFT notes about versions of its own."""

    @classmethod
    def of(cls, lift: LiftConfig, base: str, is_trained: bool) -> LiftPeftConfig:
        """Of an adapter of the base that has this name."""
        return cls(
            task_type="CAUSAL_LM",
            base_model_name_or_path=base,
            inference_mode=not is_trained,
            lift=lift,
        )
