"""What a run will take, before anything of it exists: static sums, and a step on fake tensors.

Nothing here knows how many bytes a thing has: each room has the rules of what it holds, with tests
against the tensors themselves, and a plan adds them up.
"""

from leanlift.plan.base import FakeBase, plan_memory
from leanlift.plan.batch import Batch, largest_batch
from leanlift.plan.planner import Known, least_nbytes
from leanlift.plan.result import CARDS_GIB, MOMENTS, MemoryPlan
from leanlift.plan.screen import format_plan, peak_line
from leanlift.plan.seen import Seen
from leanlift.plan.settings import PlanSettings
from leanlift.plan.shapes import Planned, shapes_of

__all__ = [
    "CARDS_GIB",
    "MOMENTS",
    "Batch",
    "FakeBase",
    "Known",
    "MemoryPlan",
    "PlanSettings",
    "Planned",
    "Seen",
    "format_plan",
    "largest_batch",
    "least_nbytes",
    "peak_line",
    "plan_memory",
    "shapes_of",
]
