"""The arguments of tool calls, in the form that a chat template takes.

Rows have them as an object, or as OpenAI's do as the text of one. Templates take the one or the
other: one that writes JSON itself would write a text as JSON once more, its quotes escaped, and one
that puts a text in cannot put an object in. Which it is, is tried on a small call.
"""

from __future__ import annotations

import json
from typing import Any

from leanlift.rows.source import Row

KEY = "leanlift"
"""The name of the argument that is tried; nothing in a template is called that."""


def takes_texts(tokenizer: Any, template: str | None = None) -> bool | None:
    """Whether a chat template takes arguments as texts.

    Args:
        tokenizer: that has a chat template.
        template: in place of its own.

    Returns:
        True for texts alone, False for objects alone, None where it takes either, or no calls.
    """
    as_object = _is_plain(tokenizer, template, {KEY: 1})
    as_text = _is_plain(tokenizer, template, json.dumps({KEY: 1}))
    return None if as_object == as_text else as_text


def _is_plain(tokenizer: Any, template: str | None, arguments: Any) -> bool:
    """Whether the text of a call has its arguments as JSON, in this form of them."""
    function = {"name": "f", "arguments": arguments}
    call = {"id": "call00000", "type": "function", "function": function}
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, chat_template=template)
    except Exception:  # a template may raise, and stumble over, anything
        return False
    return f'"{KEY}"' in text and f'\\"{KEY}\\"' not in text


def as_taken(turns: list[Row], texts: bool | None) -> list[Row]:
    """A chat whose calls have their arguments in the form that `takes_texts` found."""
    if texts is None or not any(turn.get("tool_calls") for turn in turns):
        return turns
    return [_turn(turn, texts) if turn.get("tool_calls") else turn for turn in turns]


def _turn(turn: Row, texts: bool) -> Row:
    calls = turn["tool_calls"]
    if not isinstance(calls, list):
        return turn
    return {**turn, "tool_calls": [_call(call, texts) for call in calls]}


def _call(call: Any, texts: bool) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call(call["function"], texts)}
    if "arguments" not in call:
        return call
    return {**call, "arguments": _arguments(call["arguments"], texts)}


def _arguments(given: Any, texts: bool) -> Any:
    """As a text or an object; what is neither JSON nor an object stays what it is."""
    if texts:
        return json.dumps(given, ensure_ascii=False) if isinstance(given, dict) else given
    if isinstance(given, str):
        try:
            found = json.loads(given)
        except (ValueError, RecursionError):
            return given
        return found if isinstance(found, dict) else given
    return given
