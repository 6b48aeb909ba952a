"""From rows that people have to examples to tokenize: a prompt and its completion, or a text.

Five shapes of rows are understood: `messages` or `conversations` (chats), `prompt`/`completion`,
a text column, and alpaca's `instruction`/`input`/`output`. All but texts become prompt and
completion, one per assistant turn, so that the loss is on completions only and does not depend on
generation markers in a chat template. What chats and texts may be is in `rows/turns.py`. Whatever a
row loses or has changed on the way is counted; what cannot be meant is refused with row and column.
Rows of pairs to choose from are other shapes (`rows/preferences.py`), and refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from leanlift.errors import UserError
from leanlift.rows.files import Row
from leanlift.rows.turns import CHAT_COLUMNS, ValueReader, with_system

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

MESSAGE = "{message}"
"""The place for what is said, in a prompt of the user's."""

NO_ASSISTANT = "no assistant turn, so nothing to train,"
EMPTY = "an empty text or completion, which is not trained,"
FIRST = "an assistant turn with nothing before it, which is not trained,"
WEIGHT = "an assistant turn of weight 0, which is not trained,"
NO_CHAT = "a value of {!r} that is not used, since the row is no chat,"
SECOND_SYSTEM = "a system prompt beside a chat that has one, which is not used,"
WRONG = "a completion marked as wrong (label false), which is trained like the others,"
NULLS = "nulls in tools or tool calls left out as missing keys"


@dataclass(frozen=True)
class RowFormat:
    """A shape of rows: the columns it needs, those it may have, and how a row is converted."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[Row, int], list[Row]]


class ExampleReader(ValueReader):
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
        super().__init__(name, images)
        self.chat, self.text_field, self.whole_chats = chat, text_field, whole_chats
        text = RowFormat((text_field,), (), self._from_text)
        named = [text] if text_field != "text" else []  # asked for: before what is only found
        formats = (
            RowFormat(("messages",), CHAT_COLUMNS, self._from_messages),
            RowFormat(("conversations",), CHAT_COLUMNS, self._from_conversations),
            RowFormat(("prompt", "completion"), CHAT_COLUMNS, self._from_prompt),
            *named,
            RowFormat(("instruction", "output"), ("input", *CHAT_COLUMNS), self._from_instruction),
            text,
        )
        shape = next((shape for shape in formats if set(columns).issuperset(shape.required)), None)
        if shape is None:
            raise UserError(
                f"row 0 of the {name} dataset has the columns {sorted(columns)}; expected "
                "messages, prompt and completion, instruction and output (input optional), or "
                f"{text_field}{_other_method(columns)}."
            )
        self.shape = shape
        judged = (
            {"answer"} if name.startswith("eval") else set()
        )  # what greedy answers are judged by
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
        known = self.shape.optional
        extra = self.template_columns(row, number, known)
        system = self.system(row, number) if "system" in known else []
        examples = self.shape.convert(row, number)
        for example in examples:
            first = "messages" if "messages" in example else "prompt"
            if not isinstance(example.get(first), list):
                for column in (*extra, *(["system"] if system else [])):
                    self.notes.add(NO_CHAT.format(column), number)
                continue
            example.update(extra)
            given = example[first]
            example[first] = with_system(given, system)
            if system and example[first] is given and given[0] != system[0]:
                self.notes.add(SECOND_SYSTEM, number)
        if "completion" in self.shape.required and row.get("label") is False:
            self.notes.add(WRONG, number)
        return examples

    def lines(self, rows: int) -> tuple[str, ...]:
        """What is to be said of so many rows."""
        unused = f"columns not used: {', '.join(self.unused)}"
        return (*self.notes.lines(rows), *([unused] if self.unused else []))

    # --- shapes ------------------------------------------------------------------------------

    def _from_messages(self, row: Row, number: int, column: str = "messages") -> list[Row]:
        """One example per assistant turn, each with everything before it as the prompt."""
        turns, weights = self.turns(row[column], number, column)
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
            prompt = self.text(prompt, number, "prompt")
            if not self.text(completion, number, "completion"):
                self.notes.add(EMPTY, number)
                return []
            return [{"prompt": prompt, "completion": completion}]
        if not (isinstance(prompt, list) and isinstance(completion, list)):
            text, chat = sorted(("prompt", "completion"), key=lambda c: isinstance(row[c], list))
            self.refuse(number, f"no chat in {text!r} but a list in {chat!r}: expected both alike")
        before, _ = self.turns(prompt, number, "prompt")
        turns, weights = self.turns(completion, number, "completion")
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
        instruction = self.text(row["instruction"], number, "instruction")
        extra = self.text(row.get("input", ""), number, "input")
        output = self.text(row["output"], number, "output")
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
        if not self.text(row[self.text_field], number, self.text_field):
            self.notes.add(EMPTY, number)
            return []
        return [{"text": row[self.text_field]}]


def _other_method(columns: Collection[str]) -> str:
    """What else is trained on such columns, for the end of a sentence."""
    if {"chosen", "rejected"} <= set(columns):
        return "; chosen and rejected are pairs, which --method dpo, orpo, cpo or reward trains on"
    if "prompt" in columns:
        return "; prompts without completions are what --method grpo or rloo trains on"
    return ""


def columns_of(rows: Any) -> list[str]:
    """The columns of a `Dataset` or stream; its first row's where a stream does not know them."""
    known: Iterable[str] | None = rows.column_names
    return list(next(iter(rows), {}) if known is None else known)
