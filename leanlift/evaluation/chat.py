"""A conversation with a model: its turns, and an answer that comes word by word."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, TextStreamer

from leanlift.data.tokens import Tokenization
from leanlift.errors import UserError
from leanlift.evaluation.answers import end_tokens
from leanlift.rows.examples import ALPACA, MESSAGE
from leanlift.rows.source import Row

PROMPTS = {"alpaca": ALPACA.replace("{instruction}", MESSAGE)}
"""Prompts that have a name."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; None: as the model's generation config says.

    Attributes:
        temperature: 0 takes the likeliest one.
        top_p, top_k: of which likeliest tokens one is drawn: a share of probability, a number.
        max_new_tokens: of an answer, at most.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_new_tokens: int = 512

    def config(self, model: Any, tokenizer: Any) -> GenerationConfig:
        """A generation config: the model's own, but for what is said here."""
        config = copy.deepcopy(model.generation_config)
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        said = {name: value for name, value in drawn.items() if value is not None}
        greedy = self.temperature == 0 or not (said or config.do_sample)
        config.do_sample = not greedy
        for name in drawn:
            if greedy:
                setattr(config, name, None)
            elif name in said:
                setattr(config, name, said[name])
        config.max_length, config.max_new_tokens = None, self.max_new_tokens
        config.eos_token_id = end_tokens(model, tokenizer)
        pad = tokenizer.pad_token_id
        config.pad_token_id = config.eos_token_id[0] if pad is None else pad
        return config


@dataclass
class Conversation:
    """What has been said so far, and how it becomes tokens.

    Attributes:
        how: of the model, or of the run that an adapter is from.
        prompt: what a message becomes where there is no chat template; holds `MESSAGE`.
        system: an instruction before all turns; None: as the template has it.
        turns: messages and answers. Without a chat template each message stands alone, and none
            are kept.
    """

    how: Tokenization
    prompt: str = MESSAGE
    system: str | None = None
    turns: list[Row] = field(default_factory=list)

    def ask(self, message: str) -> list[int]:
        """The tokens that the model goes on from, to answer a message.

        Raises:
            UserError: the chat template refuses it.
        """
        if not self.how.chat:
            return self.how.to_answer(self.prompt.replace(MESSAGE, message), "the message")
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        said = [*first, *self.turns, {"role": "user", "content": message}]
        return self.how.to_answer(said, "the conversation")

    def keep(self, message: str, answer: str) -> None:
        """Both belong to what is said next."""
        if self.how.chat:
            self.turns += [
                {"role": "user", "content": message},
                {"role": "assistant", "content": answer},
            ]

    def room(self, model: Any, prompt: Sequence[int]) -> int | None:
        """Tokens that an answer can have; None: as many as it likes.

        Raises:
            UserError: the conversation is longer than the model has positions for.
        """
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(most, int):
            return None
        if len(prompt) >= most:
            raise UserError(
                f"the conversation has {len(prompt)} tokens, and the model has positions for "
                f"{most}: /clear begins a new one."
            )
        return most - len(prompt)


def answer(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    sampling: Sampling,
    write: Callable[[str], None] = lambda text: None,
) -> str:
    """The text that a model answers with; Ctrl-C ends it early, with what there is by then.

    Args:
        prompt: token ids.
        write: is given the text in pieces, as they come.
    """
    pieces: list[str] = []

    def told(text: str) -> None:
        if text:
            pieces.append(text)
            write(text)

    config = sampling.config(model, tokenizer)
    streamer = _Answer(tokenizer, config.eos_token_id, told)
    ids = torch.tensor([list(prompt)], device=model.device)
    try:
        with torch.no_grad():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                streamer=streamer,
            )
    except KeyboardInterrupt:
        streamer.end()
    return "".join(pieces)


class _Answer(TextStreamer):
    """Tells the text of new tokens, but for the end token, which need not be a special one."""

    def __init__(self, tokenizer: Any, ends: Sequence[int], told: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.ends, self.told = set(ends), told

    def put(self, value: Tensor) -> None:
        is_end = not self.next_tokens_are_prompt and set(value.flatten().tolist()) <= self.ends
        if not is_end:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.told(text)
