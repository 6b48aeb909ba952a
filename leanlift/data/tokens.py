"""From an example to token ids and labels: the one way in which leanlift does it.

Training, evaluation, calibration and verification all come through here, so that what is measured
is what is trained. The rules are TRL's (the tests hold this against its SFTTrainer): a text and a
completion end in the end token once, labels begin where prompt and whole part, which is not always
after the prompt, and a chat goes through its template with `tools` and `chat_template_kwargs`.
Where TRL leaves a start or end token doubled, because the tokenizer adds one by itself, there is
one here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, NamedTuple

from trl.data_utils import common_prefix_length

from leanlift.data.calls import as_taken, takes_texts
from leanlift.data.left_out import left_out
from leanlift.data.tokenizer import as_ids, check_end_token, marked_template
from leanlift.errors import UserError, first_line
from leanlift.rows.source import Row

IGNORED = -100

ROW_KEYS = ("dataset_text_field", "completion_only_loss", "assistant_only_loss")
"""The training arguments that say what of a row is trained."""


class Tokens(NamedTuple):
    """One example.

    Attributes:
        prompt: what a model is given to answer; empty for a text.
        ids: of the whole.
        labels: as many; -100 is not trained.
        parted: whether the whole does not begin with the prompt.
        left_out: what of the row its chat template left out, in words.
    """

    prompt: list[int]
    ids: list[int]
    labels: list[int]
    parted: bool = False
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tokenization:
    """How examples of a dataset become tokens.

    Attributes:
        tokenizer: prepared (see `prepare_tokenizer`).
        text_field: the column of plain texts.
        template: a chat template in place of the tokenizer's own.
        completion_only: False trains prompts too; None: completions where there are some.
        assistant_only: train what the template marks as the assistant's alone.
        rows: of the embedding; None: not known.
        ends: ids at which generation stops.
        asked: whether rows are measured, not trained on: of a text, which has no part that could
            count alone, all counts then.
    """

    tokenizer: Any
    text_field: str = "text"
    template: str | None = None
    completion_only: bool | None = None
    assistant_only: bool = False
    rows: int | None = None
    ends: frozenset[int] = frozenset()
    asked: bool = False

    @classmethod
    def of(
        cls, tokenizer: Any, sft: Any = None, rows: int | None = None, ends: Any = None
    ) -> Tokenization:
        """As training arguments, or TRL's defaults, have it.

        Args:
            tokenizer: prepared.
            sft: an `SFTConfig`.
            rows: of the embedding.
            ends: end tokens of the base's generation config.

        Raises:
            UserError: no end token; or assistant_only_loss, and a template that does not say what
                is the assistant's.
        """
        check_end_token(tokenizer)
        assistant_only = bool(getattr(sft, "assistant_only_loss", False))
        return cls(
            tokenizer,
            getattr(sft, "dataset_text_field", "text"),
            marked_template(tokenizer) if assistant_only else None,
            getattr(sft, "completion_only_loss", None),
            assistant_only,
            rows,
            frozenset([*as_ids(ends), *as_ids(tokenizer.eos_token_id)]),
        )

    @classmethod
    def as_trained(
        cls, tokenizer: Any, facts: Any, rows: int | None = None, ends: Any = None
    ) -> Tokenization:
        """As a run had it, by the `run.json` that it left; what that does not say is a default."""
        facts = facts if isinstance(facts, dict) else {}
        kinds = dict(zip(ROW_KEYS, (str, bool, bool), strict=True))
        said = {key: facts[key] for key, kind in kinds.items() if isinstance(facts.get(key), kind)}
        return cls.of(tokenizer, SimpleNamespace(**said), rows, ends)

    @property
    def chat(self) -> bool:
        """Whether there is a chat template."""
        return getattr(self.tokenizer, "chat_template", None) is not None

    def __call__(self, example: Row, where: str) -> Tokens:
        """Tokenize `text`, `prompt` and `completion`, `messages`, or check given `input_ids`.

        Args:
            example: of an `ExampleReader`, or a tokenized row.
            where: the row, for messages.

        Raises:
            UserError: the template refuses the chat, or a token that the embedding has no row for.
        """
        if "input_ids" in example:
            tokens = self._given(example, where)
        elif isinstance(example.get("prompt", example.get("messages")), list):
            tokens = self._of_chat(example, where)
        else:
            tokens = self._of_text(example, where)
        self._check_ids(tokens, where)
        return tokens

    def to_answer(self, prompt: str | list[Row], where: str) -> list[int]:
        """Tokens of what a model is given to answer: a text, or the turns of a chat.

        Raises:
            UserError: as for an example; see `__call__`.
        """
        if isinstance(prompt, str):
            ids = self._before(prompt)
        else:
            turns, options = (
                as_taken(prompt, self._texts_of_calls),
                {"chat_template": self.template},
            )
            ids = self._render(turns, where, options, add_generation_prompt=True)["input_ids"]
        self._check_ids(Tokens(ids, [], []), where)
        return ids

    def of_document(self, text: str) -> list[int]:
        """Tokens of a text of any length as it stands: a start token where the tokenizer puts one
        there by itself, and no end token."""
        ids = self._encode(text, verbose=False)  # that it is long is no news
        return ids[:-1] if self._adds_end else ids

    # --- texts -------------------------------------------------------------------------------

    def _of_text(self, example: Row, where: str) -> Tokens:
        if self.assistant_only and not self.asked:
            raise UserError(
                f"{where} is no chat, and assistant_only_loss trains the assistant's turns alone: "
                "leave it out."
            )
        if "text" in example:
            if self.completion_only and not self.asked:
                raise UserError(
                    f"{where} is a text, which has no completion for completion_only_loss to train "
                    "alone: leave it out, or give prompt and completion."
                )
            ids = self._encode(self._ended(example["text"]))
            return Tokens([], ids, list(ids))
        prompt, whole = example["prompt"], example["prompt"] + self._ended(example["completion"])
        return self._completed(self._before(prompt), self._encode(whole))

    def _before(self, prompt: str) -> list[int]:
        """Tokens of a text that goes on."""
        ids = self._encode(prompt)
        if self._adds_end and not prompt.endswith(self.tokenizer.eos_token):
            ids = ids[:-1]
        return ids

    def _encode(self, text: str, **more: Any) -> list[int]:
        start = self.tokenizer.bos_token
        if self._adds_start and text.startswith(start):
            text = text.removeprefix(start)
        return self._ids_of(text, **more)

    def _ids_of(self, text: str, **more: Any) -> list[int]:
        try:
            return list(self.tokenizer(text=text, **more)["input_ids"])
        except Exception as error:  # tokenizers raises bare Exceptions where its files do not agree
            raise UserError(
                f"the tokenizer of {self.tokenizer.name_or_path or 'the base'} cannot take a text "
                f"apart: {first_line(error).rstrip('.')}; its files are damaged, fetch them again."
            ) from error

    def _ended(self, text: str) -> str:
        end = self.tokenizer.eos_token
        if self._adds_end:
            return text.removesuffix(end)
        return text if text.endswith(end) else text + end

    @cached_property
    def _adds_start(self) -> bool:
        """Whether the tokenizer puts the start token before a text by itself."""
        return self._ids_of("a")[:1] == [self.tokenizer.bos_token_id]

    @cached_property
    def _adds_end(self) -> bool:
        """Whether the tokenizer puts the end token behind a text by itself."""
        return self._ids_of("a")[-1:] == [self.tokenizer.eos_token_id]

    def _completed(self, prompt: list[int], ids: list[int]) -> Tokens:
        start = common_prefix_length(prompt, ids)
        labels = [IGNORED] * start + ids[start:] if self.completion_only is not False else ids[:]
        return Tokens(prompt, ids, labels, parted=start < len(prompt))

    # --- chats -------------------------------------------------------------------------------

    def _of_chat(self, example: Row, where: str) -> Tokens:
        if not self.chat:
            raise UserError(
                f"{where} is a chat, and the tokenizer has no chat template: give one with "
                "chat_template_path, or rows with prompt and completion as texts."
            )
        options = {
            "chat_template": self.template,
            "tools": example.get("tools"),
            **(example.get("chat_template_kwargs") or {}),
        }
        if "messages" in example:
            before_turns, turns = [], as_taken(example["messages"], self._texts_of_calls)
            whole = self._render(turns, where, options, marked=self.assistant_only)
            ids = whole["input_ids"]
            tokens = Tokens([], ids, list(ids))
        else:
            before_turns = as_taken(example["prompt"], self._texts_of_calls)
            before = self._render(before_turns, where, options, add_generation_prompt=True)
            turns = before_turns + as_taken(example["completion"], self._texts_of_calls)
            whole = self._render(turns, where, options, marked=self.assistant_only)
            tokens = self._completed(list(before["input_ids"]), whole["input_ids"])
        tokens = tokens._replace(left_out=self._left_out(turns, len(before_turns), options))
        if not self.assistant_only:
            return tokens
        marks = whole.get("assistant_masks", ())
        if 1 not in marks:
            raise UserError(
                f"{where} has no token that its chat template marks as the assistant's, which "
                "assistant_only_loss wants: put {% generation %} and {% endgeneration %} around "
                "the assistant's turns in the template, or leave assistant_only_loss out."
            )
        both = zip(tokens.labels, marks, strict=True)
        return tokens._replace(labels=[label if mark else IGNORED for label, mark in both])

    @cached_property
    def _texts_of_calls(self) -> bool | None:
        return takes_texts(self.tokenizer, self.template)

    def _render(
        self,
        turns: list[Row],
        where: str,
        options: dict[str, Any],
        marked: bool = False,
        **more: Any,
    ) -> dict[str, list[int]]:
        if marked:
            more["return_assistant_tokens_mask"] = True
        try:
            found = self.tokenizer.apply_chat_template(
                turns, tokenize=True, return_dict=True, **more, **options
            )
        except Exception as error:  # a template may raise, and stumble over, anything
            raise UserError(
                f"{where} cannot be put into the chat template: {first_line(error)}"
            ) from error
        return {key: list(value) for key, value in found.items()}

    def _left_out(self, turns: list[Row], trained: int, options: dict[str, Any]) -> tuple[str, ...]:
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, **options)
        said = {key: value for key, value in options.items() if key != "chat_template"}
        template = self.template or self.tokenizer.get_chat_template(tools=said["tools"])
        return tuple(sorted(left_out(turns, trained, said, text, template)))

    # --- tokens ------------------------------------------------------------------------------

    def _given(self, row: Row, where: str) -> Tokens:
        """A tokenized row: its labels, or those that its masks leave; without its padding."""
        ids = _ints(row["input_ids"], "input_ids", where)
        columns = {key: row[key] for key in MASKS if row.get(key) is not None}
        labels = list(ids)
        if row.get("labels") is not None:
            labels = _ints(row["labels"], "labels", where)
            columns = {key: mask for key, mask in columns.items() if key == "attention_mask"}
        if self.completion_only is False:
            columns.pop("completion_mask", None)
        masks = {key: _ints(mask, key, where) for key, mask in columns.items()}
        for key, values in {"labels": labels, **masks}.items():
            if len(values) != len(ids):
                raise UserError(
                    f"{where} has {len(ids)} input_ids and {len(values)} {key}: expected as many."
                )
        real = masks.pop("attention_mask", [1] * len(ids))
        trained = [all(bits) for bits in zip(*masks.values(), strict=True)] or [True] * len(ids)
        kept = [i for i, bit in enumerate(real) if bit]
        return Tokens(
            [], [ids[i] for i in kept], [labels[i] if trained[i] else IGNORED for i in kept]
        )

    def _check_ids(self, tokens: Tokens, where: str) -> None:
        """No id outside the embedding, which would end in an index error or a device assert."""
        for kind, ids in (("token", tokens.ids), ("token of its prompt", tokens.prompt)):
            highest, lowest = max(ids, default=0), min(ids, default=0)
            if self.rows is not None and highest >= self.rows:
                text = self.tokenizer.convert_ids_to_tokens(highest)
                raise UserError(
                    f"{where} has a {kind}, {text!r}, with the id {highest}, and the base's "
                    f"embedding has {self.rows} rows: the tokenizer and the base do not belong "
                    "together, or its tokens were added and need get_lift_model(model, config, "
                    f"embedding_rows={highest + 1})."
                )
            if lowest < 0:
                raise UserError(f"{where} has a {kind} with the id {lowest}.")
        wrong = [x for x in tokens.labels if x != IGNORED and not 0 <= x < (self.rows or x + 1)]
        if wrong:
            raise UserError(
                f"{where} has the label {wrong[0]}: expected -100, or the id of a token."
            )


MASKS = ("attention_mask", "completion_mask", "assistant_masks")
"""Columns of tokenized rows that take tokens out; the last two where there are no labels."""


def _ints(values: Any, column: str, where: str) -> list[int]:
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes, dict)):
        values = [None]
    found = list(values)
    if not all(isinstance(value, int) for value in found):
        raise UserError(f"{where} has no list of whole numbers in {column!r}.")
    return found
