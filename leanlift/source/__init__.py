"""A base checkpoint on disk, read by rows, without transformers."""

from leanlift.source.checkpoint import INDEX, WEIGHTS, SourceTensor, open_checkpoint
from leanlift.source.homes import (
    check_homes,
    check_matrix_homes,
    locate,
    matrix_cells,
    stored_cells,
)
from leanlift.source.stock import loading_nbytes, stored_quantization
from leanlift.source.stored import Stored, StoredMatrix, plain_view

__all__ = [
    "INDEX",
    "WEIGHTS",
    "SourceTensor",
    "Stored",
    "StoredMatrix",
    "check_homes",
    "check_matrix_homes",
    "loading_nbytes",
    "locate",
    "matrix_cells",
    "open_checkpoint",
    "plain_view",
    "stored_cells",
    "stored_quantization",
]
