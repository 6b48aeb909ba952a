"""Where the memory went: live bytes, a meter by phase and category, the report, its picture.

Nothing here plans: what a step will take is `leanlift.plan`'s.
"""

from leanlift.measure.live import LiveBytes
from leanlift.measure.meter import (
    CATEGORIES,
    MemoryMeter,
    MemoryReport,
    PhasePeak,
    is_out_of_memory,
    machine_nbytes,
    resident_now,
    resident_peak,
    state_buffers,
    static_categories,
    tensor_bytes,
)
from leanlift.measure.report import format_report, human, save_report

__all__ = [
    "CATEGORIES",
    "LiveBytes",
    "MemoryMeter",
    "MemoryReport",
    "PhasePeak",
    "format_report",
    "human",
    "is_out_of_memory",
    "machine_nbytes",
    "resident_now",
    "resident_peak",
    "save_report",
    "state_buffers",
    "static_categories",
    "tensor_bytes",
]
