"""JSON from files that anyone may have written, within bounds.

A file may be a pipe that nobody writes to, a device without end, or JSON made to cost a parser
more than its size says. What leanlift itself writes is far inside these bounds.
"""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any

MOST_BYTES = 64 * 2**20
"""Of any file; the state of a run that logged two hundred thousand steps."""

MOST_OF_A_STRANGER = 16 * 2**20
"""Of a file of an adapter; what one of ten thousand matrices says of itself has less."""

MOST_DEPTH = 64
MOST_DIGITS = 100
"""Of an integer: more than any generator's state has, fewer than a float can be made of."""


def read_bounded(path: Path, most: int = MOST_BYTES) -> str:
    """The text of a regular file.

    Raises:
        ValueError: it is something else (a pipe, a device), larger than `most` bytes, or no UTF-8.
        OSError: it cannot be read.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no regular file")
    if found.st_size > most:
        raise ValueError(f"it has {found.st_size:,} bytes, more than {most:,}")
    with path.open("rb") as file:  # no more than that, should it grow
        return file.read(found.st_size).decode("utf-8")


def parse_bounded(text: str) -> Any:
    """Parsed JSON whose nesting and integers are of ordinary size.

    Raises:
        ValueError: it is no JSON, or out of bounds.
    """
    try:
        data = json.loads(text, parse_int=_integer)
    except RecursionError:
        raise ValueError("it is nested without end") from None
    level = [data] if isinstance(data, (dict, list)) else []
    for _ in range(MOST_DEPTH):
        parts = (node.values() if isinstance(node, dict) else node for node in level)
        level = [child for part in parts for child in part if isinstance(child, (dict, list))]
    if level:
        raise ValueError(f"it is nested more than {MOST_DEPTH} deep")
    return data


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"it has an integer of {len(digits)} digits")
    return int(digits)


LARGEST_SIDE = 2**31 - 1
"""Of a matrix."""


def is_module_name(name: Any) -> bool:
    """`a.b.0.c`: nothing that could climb out of a model, or of a directory."""
    return isinstance(name, str) and re.fullmatch(r"\w+(\.\w+)*", name, re.ASCII) is not None


def is_shape(shape: Any) -> bool:
    """Whether JSON holds the two sides of a matrix."""
    return (
        isinstance(shape, list)
        and len(shape) == 2
        and all(type(side) is int and 1 <= side <= LARGEST_SIDE for side in shape)
    )
