"""Screens as text files: what a command shows is held against `tests/screens/NAME.txt`.

A screen is 80 columns of plain text. What differs from machine to machine (a time, a path) is
replaced by a stated word before it is compared, never whole lines. `UPDATE_SCREENS=1` writes the
files anew; read the difference before it is committed.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path

SCREENS = Path(__file__).parent / "screens"
WIDTH = 80


def assert_screen(shown: str, name: str, varies: Mapping[str, str] | None = None) -> None:
    """That a screen is the one in the file of that name, and fits 80 columns without colour.

    Args:
        shown: what was written to the terminal.
        name: of the file, without `.txt`.
        varies: regular expression -> word in its place, applied in order.
    """
    assert "\x1b" not in shown, f"the screen {name} has control characters"
    wide = [line for line in shown.splitlines() if len(line) > WIDTH]
    for pattern, word in (varies or {}).items():
        shown = re.sub(pattern, word, shown)
    wide = [line for line in wide if line in shown.splitlines()]
    assert not wide, f"wider than {WIDTH} columns in {name}: {wide}"
    text = "".join(f"{line.rstrip()}\n" for line in shown.splitlines())
    path = SCREENS / f"{name}.txt"
    if os.environ.get("UPDATE_SCREENS"):
        SCREENS.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    expected = path.read_text(encoding="utf-8") if path.is_file() else ""
    difference = difflib.unified_diff(
        expected.splitlines(), text.splitlines(), str(path), "shown", lineterm=""
    )
    assert text == expected, "\n" + "\n".join(difference)
