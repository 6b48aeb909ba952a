"""Where the memory went."""

from leanlift.memory.live import LiveBytes
from leanlift.memory.measure import (
    CATEGORIES,
    MemoryMeter,
    MemoryReport,
    PhasePeak,
    static_categories,
    tensor_bytes,
)
from leanlift.memory.plan import CARDS_GIB, MemoryPlan, StepSettings, plan_step
from leanlift.memory.report import REPORT_NAME, format_report, human, load_report, save_report

__all__ = [
    "CARDS_GIB",
    "MemoryPlan",
    "StepSettings",
    "plan_step",
    "CATEGORIES",
    "REPORT_NAME",
    "LiveBytes",
    "MemoryMeter",
    "MemoryReport",
    "PhasePeak",
    "format_report",
    "human",
    "load_report",
    "save_report",
    "static_categories",
    "tensor_bytes",
]
