"""Where the memory went."""

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
from leanlift.memory.plan import CARDS_GIB, MemoryPlan, StepSettings, plan_step
from leanlift.memory.report import (
    REPORT_NAME,
    format_plan,
    format_report,
    human,
    load_report,
    save_report,
)

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
    "machine_nbytes",
    "plan_step",
    "resident_now",
    "resident_peak",
    "save_report",
    "static_categories",
    "tensor_bytes",
]
