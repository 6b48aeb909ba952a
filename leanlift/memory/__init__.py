"""Where the memory went."""

from leanlift.measured import REPORT_NAME, load_report
from leanlift.memory.live import LiveBytes
from leanlift.memory.measure import (
    CATEGORIES,
    MemoryMeter,
    MemoryReport,
    PhasePeak,
    is_out_of_memory,
    machine_nbytes,
    resident_now,
    resident_peak,
    static_categories,
    tensor_bytes,
)
from leanlift.memory.pieces import first_tiles
from leanlift.memory.plan import (
    CARDS_GIB,
    MOMENTS,
    Known,
    MemoryPlan,
    least_nbytes,
    plan_step,
    shapes_of,
)
from leanlift.memory.plan_screen import format_plan, peak_line
from leanlift.memory.report import format_report, human, save_report
from leanlift.memory.rules import StepSettings

__all__ = [
    "CARDS_GIB",
    "CATEGORIES",
    "MOMENTS",
    "REPORT_NAME",
    "Known",
    "LiveBytes",
    "MemoryMeter",
    "MemoryPlan",
    "MemoryReport",
    "PhasePeak",
    "StepSettings",
    "first_tiles",
    "format_plan",
    "format_report",
    "human",
    "is_out_of_memory",
    "least_nbytes",
    "load_report",
    "machine_nbytes",
    "peak_line",
    "plan_step",
    "resident_now",
    "resident_peak",
    "save_report",
    "shapes_of",
    "static_categories",
    "tensor_bytes",
]
