"""AdamW for value vectors, and optimizer state that follows its entries."""

from leanlift.optim.adamw import SparseAdamW
from leanlift.optim.arithmetic import adamw_update
from leanlift.optim.moments import TABLES_NBYTES, adamw_nbytes
from leanlift.optim.nbytes import moment_sizes, optimizer_nbytes, update_nbytes
from leanlift.optim.remap import check_remappable, remap_entries, state_nbytes
from leanlift.optim.saved import SavedState, check_saved, restore_state, saved_state, unwrap
from leanlift.optim.validate import LARGEST_GRADIENT

__all__ = [
    "LARGEST_GRADIENT",
    "TABLES_NBYTES",
    "SavedState",
    "SparseAdamW",
    "adamw_nbytes",
    "adamw_update",
    "check_remappable",
    "check_saved",
    "moment_sizes",
    "optimizer_nbytes",
    "remap_entries",
    "restore_state",
    "saved_state",
    "state_nbytes",
    "unwrap",
    "update_nbytes",
]
