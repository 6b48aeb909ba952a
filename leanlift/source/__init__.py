"""A base checkpoint on disk, read by rows; where the tensors of a live model are in it.

transformers is known to `conversion`, which follows what it renames while it loads, and to `empty`,
which asks it how it calls things, alone.
"""

from leanlift.source.base import stored_base
from leanlift.source.checkpoint import INDEX, WEIGHTS, SourceTensor, open_checkpoint, open_files
from leanlift.source.conversion import keys_while_loading, layout_in, layout_of
from leanlift.source.homes import (
    check_homes,
    check_matrix_homes,
    find,
    home_of,
    matrix_cells,
    other_stored_end,
    stored_cells,
)
from leanlift.source.joined import JoinedRows, Rows, by_rows, turned_rows
from leanlift.source.stock import (
    has_mxfp4,
    loading_nbytes,
    stored_quantization,
    without_mxfp4,
)
from leanlift.source.stored import Stored, StoredMatrix, plain_view

__all__ = [
    "INDEX",
    "WEIGHTS",
    "JoinedRows",
    "Rows",
    "SourceTensor",
    "Stored",
    "StoredMatrix",
    "by_rows",
    "check_homes",
    "check_matrix_homes",
    "find",
    "has_mxfp4",
    "home_of",
    "keys_while_loading",
    "layout_in",
    "layout_of",
    "loading_nbytes",
    "matrix_cells",
    "open_checkpoint",
    "open_files",
    "other_stored_end",
    "plain_view",
    "stored_base",
    "stored_cells",
    "stored_quantization",
    "turned_rows",
    "without_mxfp4",
]
