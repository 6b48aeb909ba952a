"""From an adapter to what other tools load: a plain checkpoint, or a PEFT adapter."""

from leanlift.export.card import CARD_NAME, TRAINING_KEYS
from leanlift.export.directory import check_space
from leanlift.export.merge import ONTO, MergeReport, merge_adapter, merge_nbytes
from leanlift.export.peft import PeftReport, export_peft

__all__ = [
    "CARD_NAME",
    "ONTO",
    "TRAINING_KEYS",
    "MergeReport",
    "PeftReport",
    "check_space",
    "export_peft",
    "merge_adapter",
    "merge_nbytes",
]
