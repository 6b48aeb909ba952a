"""The first rows of a file, looked at before anything heavy is imported."""

from __future__ import annotations

from itertools import islice
from typing import Any

from leanlift.errors import UserError
from leanlift.rows.examples import ExampleReader
from leanlift.rows.files import (
    CELLS,
    LINES,
    check_place,
    is_document,
    is_read_here,
    read_rows,
)
from leanlift.rows.images import image_column
from leanlift.rows.preferences import PreferenceReader

SFT = "sft"

LOOKED_AT = 20
"""First rows that are converted."""

LARGE = 64 * 2**20
"""Bytes from which a JSON list, which is read as a whole, is left to the later checks."""


def check_first_rows(source: str, name: str, text_field: str = "text", method: str = SFT) -> None:
    """Whether the columns and the first rows of a text file are of a known shape.

    Args:
        source: the file; another kind, and a large list, is left to the later checks.
        name: "train" or "eval".
        text_field: the column of plain texts.
        method: that the rows are for, "sft" or one of `METHODS`.

    Raises:
        UserError: they are not, or there are none.
    """
    path, kind = check_place(source)
    whole = path.suffix.lower() not in (*LINES, *CELLS)
    if not is_read_here(kind) or (whole and path.stat().st_size > LARGE):
        return
    rows = list(islice(read_rows(path), None if whole else LOOKED_AT))
    if not rows:
        raise UserError(f"{source} holds no rows: there is nothing to train on.")
    if is_document(rows[0]):
        if method != SFT:
            raise UserError(f"{source} is a text, and {method} takes no texts: give it rows.")
        return
    _read_rows(rows, name, text_field, method)


def _read_rows(rows: list[dict[str, Any]], name: str, text_field: str, method: str) -> None:
    columns = sorted({column for row in rows for column in row})
    if "input_ids" in columns:
        return
    images = image_column(columns) is not None
    reader: ExampleReader | PreferenceReader
    if method == SFT:
        reader = ExampleReader(name, columns, True, text_field, images=images)
    else:
        reader = PreferenceReader(method, name, columns)
    for number, row in enumerate(rows[:LOOKED_AT]):
        reader({column: value for column, value in row.items() if value is not None}, number)
