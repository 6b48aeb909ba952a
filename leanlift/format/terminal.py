"""Where text goes: rich's console, and tables that fit 80 columns."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 80
"""Columns of what is not a terminal, and the most that a table takes."""


def console(file: TextIO | None = None) -> Console:
    """A console on `file` (now's standard output); no colour and 80 columns where it is not a
    terminal. Words of ours are printed as they are: no markup, no highlighting."""
    from rich.console import Console

    file = sys.stdout if file is None else file
    width = None if file.isatty() else WIDTH
    return Console(file=file, width=width, markup=False, highlight=False, emoji=False)


def table(rows: Sequence[Sequence[Any]], head: Sequence[str], left: int = 1) -> list[str]:
    """Lines of a table without borders, at most 80 columns: the first `left` columns to the left,
    the others to the right. The first column is cut where it is too long.

    Args:
        rows: cells, as many as `head` has; str() of each is shown.
        head: names of the columns.
    """
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    over = sum(widths) + 2 * (len(widths) - 1) - WIDTH
    widths[0] = max(8, widths[0] - max(0, over))

    def cell(text: str, i: int) -> str:
        if len(text) > widths[i]:
            text = text[: widths[i] - 1] + "…"
        return text.ljust(widths[i]) if i < left else text.rjust(widths[i])

    lines = ["  ".join(cell(text, i) for i, text in enumerate(row)).rstrip() for row in cells]
    return [lines[0], "─" * max(map(len, lines)), *lines[1:]]
