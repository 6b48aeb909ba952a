"""Optimizer state that follows its entries when the mask changes."""

from leanlift.optim.follow import check_followable, follow_entries, state_nbytes

__all__ = ["check_followable", "follow_entries", "state_nbytes"]
