"""From an adapter and a base checkpoint to a plain one."""

from leanlift.export.merge import ONTO, MergeReport, merge_adapter

__all__ = ["ONTO", "MergeReport", "merge_adapter"]
