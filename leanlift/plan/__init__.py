"""What a run will take, before anything of it exists: static sums, and a step on fake tensors."""

from leanlift.plan.memory import (
    CARDS_GIB,
    MOMENTS,
    Known,
    MemoryPlan,
    least_nbytes,
    plan_step,
    shapes_of,
)
from leanlift.plan.pieces import first_tiles
from leanlift.plan.rules import StepSettings
from leanlift.plan.screen import format_plan, peak_line

__all__ = [
    "CARDS_GIB",
    "MOMENTS",
    "Known",
    "MemoryPlan",
    "StepSettings",
    "first_tiles",
    "format_plan",
    "least_nbytes",
    "peak_line",
    "plan_step",
    "shapes_of",
]
