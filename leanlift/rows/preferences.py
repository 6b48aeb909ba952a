"""Rows of the methods that learn from preferences or rewards, in TRL's formats.

Pairs have `chosen` and `rejected`, with `prompt` or with the prompt in both (the turns, or the
text, that they begin with). Unpaired rows have `prompt`, `completion` and `label`, true where the
completion is wanted. Prompts alone have `prompt`, and whatever else a reward function asks for. All
of them are texts or chats, the same in all columns of a row and in all rows.

A row is held against what its method wants, chats are brought into the form that templates know
(`rows/turns.py`), and what other people's rows have instead of TRL's form is taken for what it
means: a prompt that `chosen` and `rejected` repeat, a chat and two turns that answer it, 0 and 1
for a label. Nothing is guessed beyond that: a row that cannot be meant is refused.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from leanlift.errors import UserError
from leanlift.rows.files import Row
from leanlift.rows.images import image_column
from leanlift.rows.turns import CHAT_COLUMNS, TEMPLATE_COLUMNS, ValueReader, with_system

ALIKE = "chosen and rejected that are the same, which say nothing,"
EMPTY = "an empty chosen, rejected or completion, which is left out,"
REPEATED = "a prompt that chosen and rejected repeat"
AS_LABEL = "a label that is no true or false taken for one"
NOT_TO_TEMPLATE = "a value of {!r} that no chat template is given,"

CHATS = ("conversations", "messages")
"""What others call a chat that chosen and rejected answer."""

SAID = ("prompt", "completion", "chosen", "rejected")
"""Columns of texts or chats."""

SFT_COLUMNS = ("messages", "conversations", "completion", "output", "text")
"""Columns that rows for supervised training are known by."""


@dataclass(frozen=True)
class Method:
    """What a method wants of its rows.

    Attributes:
        shapes: sets of columns, one of which every row has.
        optional: those it may have beside them.
        words: what it wants, for messages.
        others: whether all other columns are passed on.
        whole: whether chosen and rejected are wanted with the prompt in them.
        to_template: columns of a row that its trainer gives to the chat template.
        streams: whether its trainer takes streams.
    """

    shapes: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...]
    words: str
    others: bool = False
    whole: bool = False
    to_template: tuple[str, ...] = TEMPLATE_COLUMNS
    streams: bool = False


PAIR = ("chosen", "rejected")
_PAIRS = "chosen and rejected, with a prompt or the prompt in both"
_PROMPTS = Method(
    (("prompt",),),
    (),
    "a prompt, and whatever columns the reward functions ask for",
    others=True,
    to_template=(),
    streams=True,
)
METHODS = {
    "dpo": Method(
        (PAIR,), ("prompt", "ref_chosen_logps", "ref_rejected_logps"), _PAIRS, streams=True
    ),
    "orpo": Method((PAIR,), ("prompt",), _PAIRS, to_template=("chat_template_kwargs",)),
    "cpo": Method((PAIR,), ("prompt",), _PAIRS, to_template=("chat_template_kwargs",)),
    "kto": Method(
        (("prompt", "completion", "label"), PAIR),
        ("prompt",),
        "a prompt, a completion and a label (true or false), or pairs of chosen and rejected",
        streams=True,
    ),
    "reward": Method((PAIR,), ("prompt", "margin"), _PAIRS, whole=True, streams=True),
    "grpo": _PROMPTS,
    "rloo": _PROMPTS,
}
"""By the names of TRL's trainers; rows of which completions alone are trained are
`rows/examples.py`'s."""

NUMBERS = ("margin", "ref_chosen_logps", "ref_rejected_logps")
LABELS = {0: False, 1: True, "0": False, "1": True, "false": False, "true": True}


class PreferenceReader(ValueReader):
    """Makes rows for one of TRL's trainers of the rows of one dataset, and keeps notes.

    Args:
        title: the method, one of `METHODS`.
        name: "train" or "eval", for messages.
        columns: of the dataset.

    Raises:
        UserError: the columns are not those of the method.
    """

    def __init__(self, title: str, name: str, columns: Collection[str]) -> None:
        super().__init__(name)
        self.title, self.method, known = title, METHODS[title], set(columns)
        shape = next((s for s in self.method.shapes if known.issuperset(s)), None)
        if shape is None:
            raise UserError(
                f"row 0 of the {name} dataset has the columns {sorted(known)}, and {title} trains "
                f"on {self.method.words}{_other_method(title, known)}."
            )
        if image_column(known) is not None:
            raise UserError(
                f"the {name} dataset has images, and {title} is trained on rows of text: leave "
                "the column out."
            )
        self.shape = shape
        self._chats: tuple[bool, int] | None = None
        self._said = [c for c in SAID if c in shape or c in self.method.optional]
        used = {*shape, *self.method.optional, *CHAT_COLUMNS}
        if shape == PAIR and "prompt" not in known:
            used |= set(CHATS)
        self.unused = [] if self.method.others else sorted(known - used)

    def __call__(self, row: Row, number: int) -> Row | None:
        """A row as the trainer takes it; None where it says nothing.

        Raises:
            UserError: a column is missing, or holds what cannot be meant; names row and column.
        """
        row = _as_named(row)
        for column in self.shape:
            if row.get(column) is None:
                self.refuse(
                    number,
                    f"no {column!r} (columns found: {sorted(row)}), and {self.title} trains on "
                    f"{self.method.words}",
                )
        said = {column: row[column] for column in self._said if row.get(column) is not None}
        made, chat = self._read(said, number)
        if self.shape == PAIR:
            system = self.system(row, number) if chat else []
            found = self._pair(made, chat, system, number)
        else:
            if chat:
                made["prompt"] = with_system(made["prompt"], self.system(row, number))
            found = self._single(made, chat, number)
        if found is None:
            return None
        return {**found, **self._numbers(row, number), **self._beside(row, number, chat)}

    def lines(self, rows: int) -> tuple[str, ...]:
        """What is to be said of so many rows."""
        unused = f"columns not used: {', '.join(self.unused)}"
        return (*self.notes.lines(rows), *([unused] if self.unused else []))

    # --- texts and chats ---------------------------------------------------------------------

    def _read(self, said: Row, number: int) -> tuple[Row, bool]:
        """Its texts, or its chats as templates know them; and whether they are chats."""
        forms = {column: isinstance(value, list) for column, value in said.items()}
        chat = forms[self.shape[-1 if self.shape == PAIR else 0]]
        if forms.get("prompt") is False and self.shape == PAIR and all(forms[c] for c in PAIR):
            said = self._without_text(said, number)
        elif len(set(forms.values())) > 1:
            texts = [column for column, is_chat in forms.items() if not is_chat]
            self.refuse(number, f"a text in {texts[0]!r} and a chat beside it: expected all alike")
        known, first = self._chats = self._chats or (chat, number)
        if chat is not known:
            kinds = ("chats", "texts") if chat else ("texts", "chats")
            self.refuse(number, f"{kinds[0]}, and row {first} has {kinds[1]}: expected all alike")
        if not chat:
            return {
                column: self.text(value, number, column) for column, value in said.items()
            }, False
        made = {}
        for column, value in said.items():
            made[column], weights = self.turns(value, number, column)
            if 0 in weights:
                self.refuse(number, f"a turn of weight 0 in {column!r}, which {self.title} has not")
        return made, True

    def _without_text(self, said: Row, number: int) -> Row:
        """Without a prompt that is the text of the first user's turn in chosen and rejected."""
        for column in PAIR:
            turns, _ = self.turns(said[column], number, column)
            asked = next((turn for turn in turns if turn["role"] == "user"), {})
            if asked.get("content") != said["prompt"]:
                self.refuse(
                    number,
                    f"a text in 'prompt' and a chat in {column!r} that does not begin with it: "
                    "expected both alike",
                )
        self.notes.add(REPEATED, number)
        return {column: said[column] for column in PAIR}

    def _pair(self, made: Row, chat: bool, system: list[Row], number: int) -> Row | None:
        """A prompt and two completions, or two whole ones where the method wants these."""
        prompt, chosen, rejected = made.get("prompt"), made["chosen"], made["rejected"]
        if chosen == rejected:
            self.notes.add(ALIKE, number)
            return None
        if prompt is None:
            size = _common(chosen, rejected)
            prompt, chosen, rejected = chosen[:size], chosen[size:], rejected[size:]
        elif chat and all(each[: len(prompt)] == prompt for each in (chosen, rejected)):
            self.notes.add(REPEATED, number)
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        if not (_says(chosen) and _says(rejected)):
            self.notes.add(EMPTY, number)
            return None
        if not prompt and not self.method.whole:
            self.refuse(number, "no prompt, and chosen and rejected that begin differently")
        if system:
            prompt = with_system(prompt, system)
        for column, turns in (("chosen", chosen), ("rejected", rejected)) if chat else ():
            self._check_answer(turns, number, column)
        if self.method.whole:
            return {"chosen": prompt + chosen, "rejected": prompt + rejected}
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    def _single(self, made: Row, chat: bool, number: int) -> Row | None:
        if not made["prompt"]:
            self.refuse(number, "nothing in 'prompt'")
        if "completion" in made:
            if not _says(made["completion"]):
                self.notes.add(EMPTY, number)
                return None
            if chat:
                self._check_answer(made["completion"], number, "completion")
        return made

    def _check_answer(self, turns: list[Row], number: int, column: str) -> None:
        if turns[-1]["role"] != "assistant":
            self.refuse(
                number,
                f"{column!r} ending with a turn of the {turns[-1]['role']}: expected one of the "
                "assistant",
            )

    # --- what stands beside them -------------------------------------------------------------

    def _numbers(self, row: Row, number: int) -> Row:
        found: Row = {}
        if "label" in self.shape:
            found["label"] = self._label(row["label"], number)
        for column in NUMBERS:
            value = row.get(column)
            if column not in self.method.optional or value in (None, ""):
                continue
            try:
                found[column] = float(value)
            except (TypeError, ValueError):
                self.refuse(number, f"{value!r:.60} in {column!r}: expected a number")
        return found

    def _label(self, value: Any, number: int) -> bool:
        if isinstance(value, bool):
            return value
        key = value.strip().lower() if isinstance(value, str) else value
        if not isinstance(key, (int, str)) or key not in LABELS:
            self.refuse(number, f"{value!r:.60} in 'label': expected true or false")
        self.notes.add(AS_LABEL, number)
        return LABELS[key]

    def _beside(self, row: Row, number: int, chat: bool) -> Row:
        """What goes to the template, and what is passed on as it is."""
        taken = self.template_columns(row, number, TEMPLATE_COLUMNS) if chat else {}
        lost = [c for c in TEMPLATE_COLUMNS if row.get(c) and c not in self.method.to_template]
        if not chat:
            lost = [column for column in CHAT_COLUMNS if row.get(column)]
        for column in lost:
            self.notes.add(NOT_TO_TEMPLATE.format(column), number)
        if not self.method.others:
            return {column: value for column, value in taken.items() if column not in lost}
        return {column: value for column, value in row.items() if column != "prompt"}


def _as_named(row: Row) -> Row:
    """A row with TRL's names: a chat that chosen and rejected answer in a turn is the prompt."""
    named = dict(row)
    for column in PAIR:
        if isinstance(row.get(column), dict):
            named[column] = [row[column]]
    chat = next((column for column in CHATS if row.get(column) is not None), None)
    if chat is not None and "prompt" not in row and set(PAIR) <= set(row):
        named["prompt"] = named.pop(chat)
    return named


def _common(chosen: Any, rejected: Any) -> int:
    """How many turns, or letters, are the prompt that two whole texts begin with, as TRL counts
    them: something is left of each, and a space before a completion belongs to it."""
    shorter = min(len(chosen), len(rejected))
    at = next((at for at in range(shorter) if chosen[at] != rejected[at]), None)
    if at is None:
        return max(shorter - 1, 0)
    return at - 1 if at and chosen[at - 1] == " " else at


def _says(said: Any) -> bool:
    """Whether a text, or any of a chat's turns, has something in it."""
    if isinstance(said, str):
        return bool(said)
    return any(turn.get("content") or turn.get("tool_calls") for turn in said)


def _other_method(title: str, columns: Collection[str]) -> str:
    """What is trained on such columns, for the end of a sentence."""
    fits = [
        name
        for name, method in METHODS.items()
        if name != title and any(set(columns).issuperset(shape) for shape in method.shapes)
    ]
    if any(column in columns for column in SFT_COLUMNS):
        fits = ["sft", *(name for name in fits if "completion" in METHODS[name].shapes[0])]
    return f"; such rows are for {' or '.join(fits)}" if fits else ""
