"""The rows that `keep_dataset_name` names, tokenized as a run's own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from leanlift.data.dataset import token_rows
from leanlift.data.lengths import Cut
from leanlift.data.ready import formatted, has_images
from leanlift.data.tokens import Tokenization
from leanlift.data.windows import window_length
from leanlift.errors import UserError
from leanlift.rows.files import is_document
from leanlift.rows.mixture import names_of, rows_of
from leanlift.rows.source import Row
from leanlift.training.arguments import RunArguments
from leanlift.training.kept import KeptRows

logger = logging.getLogger("leanlift")


def kept_rows(
    args: RunArguments, loop: Any, how: Tokenization, format: Callable[[Row], str] | None = None
) -> tuple[KeptRows, ...]:
    """Read and tokenize them; what is said of them is said of each by its name. Rows are cut to
    max_length as others are; texts are read in windows of it. All of a text counts, whatever of
    others is trained alone.

    Args:
        args, loop: of the run.
        how: its tokenization.
        format: makes a text of a row.

    Raises:
        UserError: rows that cannot be used; says which.
    """
    parts, how = args.kept_parts(), replace(how, asked=True)
    length = getattr(loop, "max_length", None)
    cut = Cut(length, getattr(loop, "truncation_mode", None) == "keep_end")
    found = []
    for part, name in zip(parts, names_of(parts), strict=True):
        rows, where = rows_of(part), f"keep ({name})"
        if has_images(rows):
            raise UserError(f"{part.path} has images, and what is kept is measured over text.")
        within = cut
        if is_document(rows.column_names):
            base, trusted = args.model_name_or_path, bool(loop.trust_remote_code)
            within = Cut(window_length(base, length, trusted, args.model_revision))
        elif format is not None:
            rows = formatted(rows, format, where)
        made = token_rows(rows, how, where, within, getattr(loop, "dataset_num_proc", None))
        lost = made.report.truncated or made.report.untrained
        (logger.warning if lost else logger.info)("%s", made.report)
        assert made.origin is not None
        found.append(KeptRows(name, made.data, tuple(made.origin["row"])))
    return tuple(found)
