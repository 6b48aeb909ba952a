"""What a chat template leaves out of a chat, without a word of its own.

A template takes what it knows: one without tools leaves `tools` out, one for thinking models the
thoughts of earlier turns, one that knows two roles the turns of a third. What is said in a chat is
therefore looked for in the text that the template made of it, whatever spaces it puts there; what
is no text, such as an option, in the template itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from leanlift.rows.source import Row

LABELS = {"role", "name", "tool_call_id", "id"}
"""Keys of a turn that say whose it is; templates that take them say so in words of their own."""


def left_out(turns: list[Row], trained: int, options: Row, text: str, template: str) -> set[str]:
    """What of a chat is in no place of its text; for a report, in words.

    Args:
        turns: the chat.
        trained: the first turn that is trained.
        options: `tools` and what else was given to the template.
        text: what the template made of them.
        template: its source.
    """
    found, plain = set(), _without_spaces(text)
    for number, turn in enumerate(turns):
        whose = f"{'a trained' if number >= trained else 'an earlier'} {turn['role']} turn"
        for key, value in turn.items():
            if key in LABELS or value is None:
                continue
            if any(not _is_in(said, plain) for said in _said(key, value)) or (
                not isinstance(value, (str, list, dict)) and not _is_named(key, template)
            ):
                found.add(f"{key!r} of {whose}"[:80])
    for key, value in options.items():
        if key == "tools":
            if any(not _is_in(name, plain) for name in _names(value or [])):
                found.add("'tools'")
        elif not _is_named(key, template):
            found.add(f"{key!r} of chat_template_kwargs"[:80])
    return {f"{what}, left out by the chat template at least in part," for what in found}


def _said(key: str, value: Any) -> Iterator[str]:
    """The texts of a turn's key that a reader of the chat would see."""
    if isinstance(value, str):
        yield value
    elif key == "tool_calls" and isinstance(value, list):
        yield from _names(value)
    elif key == "function_call":
        yield from _names([value])


def _names(functions: list[Any]) -> Iterator[str]:
    """Of tools or calls, which hold a function or are one."""
    for given in functions:
        function = given.get("function", given) if isinstance(given, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str):
            yield name


def _is_in(said: str, plain: str) -> bool:
    """Whether a text, or its form in JSON, is in another that has no spaces."""
    forms = (said, json.dumps(said, ensure_ascii=False)[1:-1], json.dumps(said)[1:-1])
    return any(_without_spaces(form) in plain for form in forms)


def _is_named(key: str, template: str) -> bool:
    return re.search(rf"\b{re.escape(key)}\b", template) is not None


def _without_spaces(text: str) -> str:
    return "".join(text.split())
