"""A text of any length as rows of tokens: windows, one behind the other.

The text is tokenized once, as it stands: with the start token where the tokenizer puts one before a
text by itself, without an end token, which the text does not have, and without a chat template. A
window begins with the last token of the one before it, so every token but the first of the text is
predicted exactly once, whatever the length of the windows; what stands before a window is not seen.
A file is one text: blank lines in it are part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from leanlift.data.tokenizer import base_number
from leanlift.data.tokens import Tokenization
from leanlift.rows.files import DOCUMENT, is_document

WINDOW = 1024
"""Tokens of a window where nothing else is said; TRL's own max_length."""


def windows(ids: Sequence[int], length: int) -> list[list[int]]:
    """Windows of at most `length` tokens, 2 or more, that have a token each in common."""
    step = max(2, length) - 1
    return [list(ids[at : at + step + 1]) for at in range(0, max(1, len(ids) - 1), step)]


def window_length(
    base: str, wanted: int | None = None, trusted: bool = False, revision: str | None = None
) -> int:
    """Tokens of a window: as many as are wanted, or `WINDOW`; no more than the base has positions,
    as far as its config.json says."""
    positions = base_number(base, "max_position_embeddings", trusted, revision)
    most = wanted or WINDOW
    return max(2, min(most, positions or most))


def in_windows(rows: Any, how: Tokenization, length: int | None = None) -> Any:
    """The text of a file as tokenized rows, `input_ids`; other rows as they are.

    Args:
        rows: a `Dataset`.
        how: the tokenization.
        length: most tokens of a window; None: `WINDOW`.
    """
    if not is_document(rows.column_names):
        return rows
    texts = [how.of_document(text) for text in rows[DOCUMENT]]
    found = [window for ids in texts for window in windows(ids, length or WINDOW)]
    return Dataset.from_dict({"input_ids": found})
