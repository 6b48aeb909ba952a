"""The template of a Modelfile, by what the model was trained on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from leanlift.evaluation.chat import PROMPTS
from leanlift.requantized.modelfile import PROMPT, RESPONSE, of_prompt
from leanlift.requantized.template import Message, turns_of
from leanlift.rows.examples import MESSAGE

DATE = "strftime_now"
"""What transformers gives to templates that want to know which day it is."""

ALPACA_COLUMNS = {"instruction", "output"}


@dataclass(frozen=True)
class Template:
    """What goes into a Modelfile.

    Attributes:
        text: in Go's syntax; None: none was found, and Ollama may find one itself.
        words: which one it is, as a sentence for the reader.
        alpaca: whether it is the prompt of rows with an instruction.
    """

    text: str | None
    words: str
    alpaca: bool = False


def template_for(tokenizer: Any, columns: Collection[str] = ()) -> Template:
    """The template for a tokenizer, and where that has no chat template, for the rows that were
    trained on.

    Args:
        tokenizer: of the merged checkpoint.
        columns: of the rows; none: not known.
    """
    if getattr(tokenizer, "chat_template", None) is not None:
        return _of_chat(tokenizer)
    if set(columns) >= ALPACA_COLUMNS:
        text = of_prompt(PROMPTS["alpaca"], MESSAGE)
        return Template(text, "puts messages into Alpaca's prompt, as its rows were", alpaca=True)
    return Template(PROMPT + RESPONSE, "gives messages to the model as they are")


def stops_of(tokenizer: Any, ends: Collection[int], template: Template) -> list[str]:
    """The texts of the tokens that end an answer, and what begins the next prompt."""
    tokens = [tokenizer.convert_ids_to_tokens(end) for end in sorted(ends)]
    return [*(str(token) for token in tokens if token), *["### Instruction:"] * template.alpaca]


def _of_chat(tokenizer: Any) -> Template:
    start = tokenizer.bos_token
    adds_start = bool(start) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]

    def render(messages: list[Message], answering: bool) -> str:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answering
        )
        return str(text).removeprefix(start) if adds_start else str(text)

    turns = turns_of(render)
    if turns is None:
        return Template(
            None,
            "has no TEMPLATE, since the model's chat template does more than put text around "
            "messages: see with `ollama show --template` whether Ollama has found one, or write it",
        )
    words = "has the model's chat template, without tools"
    if DATE in str(tokenizer.chat_template):
        words += ", and with the date of today, which the template asks for, for good"
    return Template(turns.go, words)
