"""From an adapter and a base checkpoint to a plain one."""

from leanlift.export.merge import MergeReport, merge_adapter

__all__ = ["MergeReport", "merge_adapter"]
