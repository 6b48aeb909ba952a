"""From rows that people have to examples to tokenize: a prompt and its completion, or a text.

Five shapes of rows are understood: `messages` or `conversations` (chats), `prompt`/`completion`,
a text column, and alpaca's `instruction`/`input`/`output`. All but texts become prompt and
completion, one per assistant turn, so that the loss is on completions only and does not depend on
generation markers in a chat template. Whatever a row loses or has changed on the way is counted in
`Notes`; what cannot be meant is refused with row and column.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from leanlift.errors import UserError
from leanlift.rows.source import Row, is_unicode

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
"""The prompts of Stanford Alpaca, which instruction data of this shape is commonly trained with."""

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
"""What other formats call the two sides of a chat."""

TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
"""Columns that go to the chat template beside the chat."""

NO_ASSISTANT = "no assistant turn, so nothing to train,"
EMPTY = "an empty text or completion, which is not trained,"
FIRST = "an assistant turn with nothing before it, which is not trained,"
WEIGHT = "an assistant turn of weight 0, which is not trained,"
PARTS = "contents joined from their text parts"
NO_CHAT = "tools that are not used, since the row is no chat,"
NULLS = "nulls in tools or tool calls left out as missing keys"


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


@dataclass(frozen=True)
class RowFormat:
    """A shape of rows: the columns it needs, those it may have, and how a row is converted."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[Row, int], list[Row]]


class ExampleReader:
    """Makes examples of the rows of one dataset, and keeps notes.

    Args:
        name: "train" or "eval", for messages.
        columns: of the dataset.
        chat: whether there is a chat template; alpaca rows then become chats.
        text_field: the column of plain texts.
        whole_chats: a chat is one example, `messages`, of which everything is trained.
        images: whether contents may have places for images; they stay lists of parts then.

    Raises:
        UserError: the columns are of no known shape.
    """

    def __init__(
        self,
        name: str,
        columns: Collection[str],
        chat: bool,
        text_field: str = "text",
        whole_chats: bool = False,
        images: bool = False,
    ) -> None:
        self.images = images
        self.name, self.chat, self.text_field = name, chat, text_field
        self.whole_chats = whole_chats
        self.notes = Notes()
        self._content: tuple[type, int] | None = None
        text = RowFormat((text_field,), (), self._from_text)
        named = [text] if text_field != "text" else []  # asked for: before what is only found
        formats = (
            RowFormat(("messages",), TEMPLATE_COLUMNS, self._from_messages),
            RowFormat(("conversations",), TEMPLATE_COLUMNS, self._from_conversations),
            RowFormat(("prompt", "completion"), TEMPLATE_COLUMNS, self._from_prompt),
            *named,
            RowFormat(("instruction", "output"), ("input", "tools"), self._from_instruction),
            text,
        )
        shape = next((shape for shape in formats if set(columns).issuperset(shape.required)), None)
        if shape is None:
            raise UserError(
                f"row 0 of the {name} dataset has the columns {sorted(columns)}; expected "
                "messages, prompt and completion, instruction and output (input optional), or "
                f"{text_field}."
            )
        self.shape = shape
        judged = {"answer"} if name == "eval" else set()  # what greedy answers are judged by
        self.unused = sorted(set(columns) - {*shape.required, *shape.optional} - judged)

    def __call__(self, row: Row, number: int) -> list[Row]:
        """The examples of a row; none where nothing of it is trained.

        Raises:
            UserError: a column is missing, or holds what cannot be meant; names row and column.
        """
        for column in self.shape.required:
            if row.get(column) is None:
                raise UserError(
                    f"row {number} of the {self.name} dataset has no {column!r} (columns found: "
                    f"{sorted(row)}); every row needs {' and '.join(self.shape.required)}."
                )
        extra = self._template_columns(row, number)
        examples = self.shape.convert(row, number)
        for example in examples:
            if isinstance(example.get("prompt", example.get("messages")), list):
                example.update(extra)
            elif extra.get("tools"):
                self.notes.add(NO_CHAT, number)
        return examples

    def lines(self, rows: int) -> tuple[str, ...]:
        """What is to be said of so many rows."""
        unused = f"columns not used: {', '.join(self.unused)}"
        return (*self.notes.lines(rows), *([unused] if self.unused else []))

    def refuse(self, number: int, problem: str) -> NoReturn:
        """Raise a UserError that names the row and says what is wrong with it."""
        raise UserError(f"row {number} of the {self.name} dataset has {problem}.")

    # --- shapes ------------------------------------------------------------------------------

    def _from_messages(self, row: Row, number: int, column: str = "messages") -> list[Row]:
        """One example per assistant turn, each with everything before it as the prompt."""
        turns, weights = self._turns(row[column], number, column)
        if self.whole_chats:
            if 0 in weights:
                self.refuse(
                    number,
                    f"a turn of weight 0 in {column!r}, which completion_only_loss=False would "
                    "train with all the others: leave one of the two out",
                )
            return [{"messages": turns}]
        places = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        if not places:
            self.notes.add(NO_ASSISTANT, number)
        return [
            {"prompt": turns[:i], "completion": [turns[i]]}
            for i in places
            if self._is_trained(turns[i], weights[i], number, first=i == 0)
        ]

    def _from_conversations(self, row: Row, number: int) -> list[Row]:
        return self._from_messages(row, number, "conversations")

    def _is_trained(self, turn: Row, weight: int, number: int, first: bool = False) -> bool:
        said = {key for key, value in turn.items() if value} - {"role", "name"}
        reason = (WEIGHT if weight == 0 else None) or (EMPTY if not said else None)
        reason = reason or (FIRST if first else None)
        if reason:
            self.notes.add(reason, number)
        return reason is None

    def _from_prompt(self, row: Row, number: int) -> list[Row]:
        prompt, completion = row["prompt"], row["completion"]
        if not (isinstance(prompt, list) or isinstance(completion, list)):
            prompt = self._text(prompt, number, "prompt")
            if not self._text(completion, number, "completion"):
                self.notes.add(EMPTY, number)
                return []
            return [{"prompt": prompt, "completion": completion}]
        if not (isinstance(prompt, list) and isinstance(completion, list)):
            text, chat = sorted(("prompt", "completion"), key=lambda c: isinstance(row[c], list))
            self.refuse(number, f"no chat in {text!r} but a list in {chat!r}: expected both alike")
        before, _ = self._turns(prompt, number, "prompt")
        turns, weights = self._turns(completion, number, "completion")
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        if not before:
            self.refuse(number, "no turn in 'prompt': expected at least one")
        if not answers:
            self.notes.add(NO_ASSISTANT, number)
            return []
        if len(answers) > 1 and len({weights[i] for i in answers}) > 1:
            self.refuse(
                number,
                "turns of weight 0 and others in one 'completion': give the whole chat as messages",
            )
        trained = [i for i in answers if self._is_trained(turns[i], weights[i], number)]
        return [{"prompt": before, "completion": turns}] if trained else []

    def _from_instruction(self, row: Row, number: int) -> list[Row]:
        instruction = self._text(row["instruction"], number, "instruction")
        extra = self._text(row.get("input", ""), number, "input")
        output = self._text(row["output"], number, "output")
        if not output:
            self.notes.add(EMPTY, number)
            return []
        if self.chat:
            question = f"{instruction}\n\n{extra}" if extra else instruction
            return [
                {
                    "prompt": [{"role": "user", "content": question}],
                    "completion": [{"role": "assistant", "content": output}],
                }
            ]
        template = ALPACA_WITH_INPUT if extra else ALPACA
        prompt = template.format(instruction=instruction, input=extra)
        return [{"prompt": prompt, "completion": output}]

    def _from_text(self, row: Row, number: int) -> list[Row]:
        if not self._text(row[self.text_field], number, self.text_field):
            self.notes.add(EMPTY, number)
            return []
        return [{"text": row[self.text_field]}]

    # --- values ------------------------------------------------------------------------------

    def _text(self, value: Any, number: int, column: str) -> str:
        if not isinstance(value, str):
            self.refuse(number, f"{value!r:.60} in {column!r}: expected a text")
        if not is_unicode(value):
            self.refuse(number, f"half of a surrogate pair in {column!r}, which is no text")
        return value

    def _turns(self, value: Any, number: int, column: str) -> tuple[list[Row], list[int]]:
        """Turns with `role` and `content` as a text (or null beside a tool call), and weights."""
        if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
            self._no_chat(number, column)
        turns, weights = [], []
        for given in value:
            turn = dict(given)
            for other, own in (("from", "role"), ("value", "content")):
                if other in turn and own not in turn:
                    turn[own] = turn.pop(other)
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

    def _no_chat(self, number: int, column: str) -> NoReturn:
        self.refuse(
            number,
            f"no list of role and content in {column!r}: every turn needs both (content may be "
            "null in an assistant turn with tool_calls)",
        )

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
            return self._text(content, number, column)
        for part in content:
            if not isinstance(part, dict) or part.get("type", "text") != "text":
                kind = part.get("type") if isinstance(part, dict) else part
                self.refuse(
                    number,
                    f"a content part {kind!r:.60} in {column!r}: expected texts alone, such as "
                    '{"type": "text", "text": "…"}',
                )
        self.notes.add(PARTS, number)
        return "".join(self._text(part.get("text"), number, column) for part in content)

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
        return {"type": "text", "text": self._text(part.get("text"), number, column)}

    def _weight(self, weight: Any, number: int, column: str) -> int:
        if weight is None:
            return 1
        if weight not in (0, 1) or isinstance(weight, str):
            self.refuse(number, f"a turn of weight {weight!r:.30} in {column!r}: expected 0 or 1")
        return int(weight)

    def _template_columns(self, row: Row, number: int) -> Row:
        """`tools` and `chat_template_kwargs`, which may be JSON texts."""
        found: Row = {}
        for column, form in zip(TEMPLATE_COLUMNS, (list, dict), strict=True):
            value = row.get(column)
            if value is None or column not in self.shape.optional:
                continue
            if isinstance(value, str):
                try:
                    value = json.loads(value)
                except ValueError:
                    self.refuse(number, f"a text in {column!r} that is no JSON")
            if not isinstance(value, form):
                self.refuse(number, f"{value!r:.60} in {column!r}: expected a {form.__name__}")
            found[column] = value
        return found


def columns_of(rows: Any) -> list[str]:
    """The columns of a `Dataset` or stream; its first row's where a stream does not know them."""
    known: Iterable[str] | None = rows.column_names
    return list(next(iter(rows), {}) if known is None else known)
