"""The screen of a run: what `leanlift train` shows, in three forms that are told the same facts.

`facts` is what a run tells, and the protocol; `words` makes lines of it; `panel` (a terminal),
`plain` (a log) and `jsonl` (a program) show them; `libraries` keeps everything else from drawing.
"""

from __future__ import annotations

import os
import sys

from leanlift.errors import UserError
from leanlift.training.screens.facts import (
    Evaluation,
    FirstRow,
    Header,
    Memory,
    Place,
    Refresh,
    Screen,
    Step,
    Summary,
)
from leanlift.training.screens.jsonl import JsonScreen
from leanlift.training.screens.plain import PlainScreen
from leanlift.training.screens.quiet import QuietScreen

__all__ = [
    "FORMATS",
    "Evaluation",
    "FirstRow",
    "Header",
    "JsonScreen",
    "Memory",
    "Place",
    "PlainScreen",
    "QuietScreen",
    "Refresh",
    "Screen",
    "Step",
    "Summary",
    "check_format",
    "screen_of",
]

FORMATS = ("auto", "rich", "plain", "json")


def check_format(name: str) -> None:
    """Refuse what is no form of a screen.

    Raises:
        UserError: it is none.
    """
    if name not in FORMATS:
        raise UserError(f"expected log_format to be one of {', '.join(FORMATS)}, got {name!r}.")


def screen_of(name: str) -> Screen:
    """The screen of that form on standard output.

    Args:
        name: "rich", "plain", "json", or "auto": rich on a terminal that can draw, else plain.

    Raises:
        UserError: another name.
    """
    check_format(name)
    if name == "json":
        return JsonScreen()
    if name == "plain" or (name == "auto" and not _draws()):
        return PlainScreen()
    from leanlift.training.screens.panel import PanelScreen

    return PanelScreen(forced=not sys.stdout.isatty())


def _draws() -> bool:
    """Whether standard output is a terminal that can draw."""
    unicode = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"
    return sys.stdout.isatty() and unicode and os.environ.get("TERM") != "dumb"
