"""Where the memory went."""

from leanlift.measured import REPORT_NAME, load_report
from leanlift.memory.live import LiveBytes
from leanlift.memory.measure import (
    CATEGORIES,
    MemoryMeter,
    MemoryReport,
    PhasePeak,
    is_out_of_memory,
    resident_peak,
    static_categories,
    tensor_bytes,
)
from leanlift.memory.plan import CARDS_GIB, MemoryPlan, StepSettings, plan_step
from leanlift.memory.report import format_plan, format_report, human, save_report

__all__ = [
    "CARDS_GIB",
    "CATEGORIES",
    "REPORT_NAME",
    "LiveBytes",
    "MemoryMeter",
    "MemoryPlan",
    "MemoryReport",
    "PhasePeak",
    "StepSettings",
    "format_plan",
    "format_report",
    "human",
    "is_out_of_memory",
    "load_report",
    "plan_step",
    "resident_peak",
    "save_report",
    "static_categories",
    "tensor_bytes",
]
