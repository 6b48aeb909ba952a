"""What chats and texts of rows may be, whatever the rows are for.

A chat is a list of turns with `role` and `content`, or as ShareGPT has it with `from` and `value`.
Roles get the names that chat templates know; a call of a function that ShareGPT's rows have as a
turn of its own becomes the assistant's turn with `tool_calls`. What is changed is noted, what
cannot be meant is refused with row and column.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from leanlift.errors import UserError
from leanlift.rows.files import Row

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
"""What other formats call the sides of a chat."""

CALLS = ("function_call", "tool_call")
"""Roles of turns that are the assistant's call of a function, as JSON."""

TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
"""Columns that go to the chat template beside the chat."""

CHAT_COLUMNS = (*TEMPLATE_COLUMNS, "system")
"""Columns that a row with a chat may have beside it."""

PARTS = "contents joined from their text parts"
CALLED = "turns of the role {} taken for the assistant's tool_calls"


@dataclass
class Notes:
    """What rows lost or had changed: for each kind, how many rows and the first of them."""

    found: dict[str, tuple[int, int]] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)

    def add(self, what: str, number: int) -> bool:
        """Note it for a row; returns whether it is the first of its kind."""
        count, first = self.found.get(what, (0, number))
        if self.last.get(what) != number:
            self.found[what] = (count + 1, first)
            self.last[what] = number
        return count == 0

    def lines(self, rows: int) -> tuple[str, ...]:
        """For a report over so many rows."""
        return tuple(
            f"{what} in {count} of {rows} rows (first: row {first})"
            for what, (count, first) in self.found.items()
        )


class ValueReader:
    """Takes chats, texts and options out of the rows of one dataset, and keeps notes.

    Args:
        name: "train" or "eval", for messages.
        images: whether contents may have places for images; they stay lists of parts then.
    """

    def __init__(self, name: str, images: bool = False) -> None:
        self.name, self.images = name, images
        self.notes = Notes()
        self._content: tuple[type, int] | None = None

    def refuse(self, number: int, problem: str) -> NoReturn:
        """Raise a UserError that names the row and says what is wrong with it."""
        raise UserError(f"row {number} of the {self.name} dataset has {problem}.")

    def text(self, value: Any, number: int, column: str) -> str:
        """A text as it is."""
        if not isinstance(value, str):
            self.refuse(number, f"{value!r:.60} in {column!r}: expected a text")
        if not is_unicode(value):
            self.refuse(number, f"half of a surrogate pair in {column!r}, which is no text")
        return value

    def template_columns(self, row: Row, number: int, columns: Iterable[str]) -> Row:
        """`tools` and `chat_template_kwargs`, which may be JSON texts, where they are among the
        columns."""
        found: Row = {}
        for column, form in zip(TEMPLATE_COLUMNS, (list, dict), strict=True):
            value = row.get(column)
            if value in (None, "") or column not in columns:
                continue
            if isinstance(value, str):
                value = self._decoded(value, number, column)
            if not isinstance(value, form):
                self.refuse(number, f"{value!r:.60} in {column!r}: expected a {form.__name__}")
            found[column] = value
        return found

    def system(self, row: Row, number: int) -> list[Row]:
        """The turn that a column of system prompts is for; none where there is no such text."""
        value = row.get("system")
        if value in (None, ""):
            return []
        return [{"role": "system", "content": self.text(value, number, "system")}]

    # --- chats -------------------------------------------------------------------------------

    def turns(self, value: Any, number: int, column: str) -> tuple[list[Row], list[int]]:
        """Turns with `role` and `content` as a text (or null beside a tool call), and weights."""
        if isinstance(value, str) and value.lstrip().startswith("["):
            value = self._decoded(value, number, column)
        if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
            self._no_chat(number, column)
        turns, weights = [], []
        for given in value:
            turn = dict(given)
            for other, own in (("from", "role"), ("value", "content")):
                if other in turn and own not in turn:
                    turn[own] = turn.pop(other)
            if turn.get("role") in CALLS:
                turn = self._call(turn, number, column)
            role, content = turn.get("role"), turn.get("content")
            calls = turn.get("tool_calls") or turn.get("function_call")
            called = ROLES.get(str(role), role) == "assistant" and bool(calls)
            if not isinstance(role, str) or not role or (content is None and not called):
                self._no_chat(number, column)
            if role in ROLES:
                turn["role"] = ROLES[role]
                self.notes.add(f"the role {role} taken for {ROLES[role]}", number)
            if content is not None:
                turn["content"] = self._content_text(content, number, column)
            weights.append(self._weight(turn.pop("weight", None), number, column))
            turns.append(turn)
        return turns, weights

    def _decoded(self, text: str, number: int, column: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            self.refuse(number, f"a text in {column!r} that is no JSON")

    def _no_chat(self, number: int, column: str) -> NoReturn:
        self.refuse(
            number,
            f"no list of role and content in {column!r}: every turn needs both (content may be "
            "null in an assistant turn with tool_calls)",
        )

    def _call(self, turn: Row, number: int, column: str) -> Row:
        """The assistant's turn that a turn of ShareGPT's with a call is."""
        role, given = turn["role"], turn.get("content")
        try:
            value = json.loads(given) if isinstance(given, str) else given
        except (ValueError, RecursionError):
            value = None
        listed = value if isinstance(value, list) else [value]
        calls = [call for call in listed if isinstance(call, dict) and _is_text(call.get("name"))]
        if not calls or len(calls) < len(listed):
            self.refuse(
                number,
                f"no call in a turn of the role {role} in {column!r}: expected JSON such as "
                '{"name": "f", "arguments": {}}',
            )
        self.notes.add(CALLED.format(role), number)
        made = [
            {
                "type": "function",
                "function": {
                    "name": call["name"],
                    "arguments": call.get("arguments", call.get("parameters", {})),
                },
            }
            for call in calls
        ]
        rest = {key: each for key, each in turn.items() if key == "weight"}
        return {"role": "assistant", "content": "", "tool_calls": made, **rest}

    def _content_text(self, content: Any, number: int, column: str) -> Any:
        """A content as a text; its parts joined where they are texts."""
        form = type(content)
        if self.images and form is list:
            return [self._part(part, number, column) for part in content]
        known, first = self._content = self._content or (form, number)
        if form in (str, list) and known in (str, list) and form is not known:
            forms = {str: "a text", list: "a list of parts"}
            self.refuse(
                number,
                f"a content in {column!r} that is {forms[form]}, and another (row {first}) is "
                f"{forms[known]}: expected all of them in one form",
            )
        if form is not list:
            return self.text(content, number, column)
        for part in content:
            if not isinstance(part, dict) or part.get("type", "text") != "text":
                kind = part.get("type") if isinstance(part, dict) else part
                self.refuse(
                    number,
                    f"a content part {kind!r:.60} in {column!r}: expected texts alone, such as "
                    '{"type": "text", "text": "…"}',
                )
        self.notes.add(PARTS, number)
        return "".join(self.text(part.get("text"), number, column) for part in content)

    def _part(self, part: Any, number: int, column: str) -> Row:
        """A part of a content that may have images: a text, or a place for an image."""
        kind = part.get("type", "text") if isinstance(part, dict) else part
        if kind == "image" and set(part) == {"type"}:
            return {"type": "image"}
        if kind != "text":
            self.refuse(
                number,
                f"a content part {part!r:.60} in {column!r}: expected texts, and "
                '{"type": "image"} for each image of the column images',
            )
        return {"type": "text", "text": self.text(part.get("text"), number, column)}

    def _weight(self, weight: Any, number: int, column: str) -> int:
        if weight is None:
            return 1
        if weight not in (0, 1) or isinstance(weight, str):
            self.refuse(number, f"a turn of weight {weight!r:.30} in {column!r}: expected 0 or 1")
        return int(weight)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def with_system(turns: list[Row], system: list[Row]) -> list[Row]:
    """A chat that begins with a system prompt, unless it has one of its own."""
    return turns if turns and turns[0]["role"] == "system" else system + turns


def is_unicode(text: str) -> bool:
    """Whether a text is whole: JSON can hold one half of a surrogate pair, UTF-8 cannot."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False
