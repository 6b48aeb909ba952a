"""`leanlift chat`: a terminal in which a model is talked to, or a message from a pipe."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import set_seed

from leanlift.cli.eval_base import arguments_of, modules_of, tokenization_of
from leanlift.errors import UserError
from leanlift.evaluation.chat import PROMPTS, Conversation, Sampling, answer
from leanlift.evaluation.evaluate import quiet_loading
from leanlift.model import freeze_quantized, load_adapter, scale_adapter
from leanlift.rows.examples import MESSAGE
from leanlift.training.base import check_base_place, load_model

HELP = """\
/base     answer without the adapter, or with it again
/compare  answer both with the adapter and without, or no longer
/clear    forget what was said
/help     this
/quit     end, as Ctrl-D does; Ctrl-C ends an answer"""

NO_TEMPLATE = (
    "The tokenizer has no chat template: each message stands alone, and goes to the model {}."
)


def chat_command(options: argparse.Namespace) -> int:
    """Load the model, then talk; or answer the one message that a pipe has."""
    options.dataset_text_field = options.formatting_func = None
    args = arguments_of(options)
    check_base_place(args)
    message = None if sys.stdin.isatty() else piped()
    base, revision = args.model_name_or_path, args.model_revision
    tokenizer, how = tokenization_of(base, revision, options)
    prompt = PROMPTS.get(options.prompt, options.prompt) or MESSAGE
    if how.chat and options.prompt is not None:
        raise UserError("the tokenizer has a chat template: leave --prompt out.")
    if not how.chat and options.system is not None:
        raise UserError(
            "the tokenizer has no chat template, so there is no place for --system: put it into "
            "--prompt."
        )
    sampling = Sampling(options.temperature, options.top_p, options.top_k, options.max_new_tokens)
    if options.seed is not None:
        set_seed(options.seed)
    with quiet_loading():
        model = loaded(options, args)
    talk = Talk(
        model, tokenizer, Conversation(how, prompt, options.system), sampling,
        options.adapter is not None, without=options.base,
    )  # fmt: skip
    if message is not None:
        talk.answer(message)
        return 0
    if not how.chat:
        print(NO_TEMPLATE.format("as it is" if prompt == MESSAGE else "in --prompt"))
    return talk.run()


def piped() -> str:
    """The message that a pipe has, without the line break at its end.

    Raises:
        UserError: there is none, or it is no text.
    """
    try:
        message = sys.stdin.read().rstrip("\r\n")
        message.encode()  # Python may read what is no text into what is no character
    except UnicodeError:
        raise UserError("the input is no text in UTF-8: expected a message.") from None
    if not message.strip():
        raise UserError("the input is empty: expected a message, or a terminal to talk in.")
    return message


def loaded(options: argparse.Namespace, args: Any) -> Any:
    """The model that answers: a base with the adapter on it, or a whole one."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    model = load_model(args, device, modules=modules_of(options))
    if options.adapter:
        load_adapter(model, options.adapter)
    else:
        freeze_quantized(model)
    return model.eval()


@dataclass
class Talk:
    """A model and what is said to it.

    Attributes:
        model, tokenizer: that answer.
        conversation: so far.
        sampling: how tokens are chosen.
        has_adapter: whether it can be taken off.
        without: whether it is off.
        compares: whether each message is answered twice.
    """

    model: Any
    tokenizer: Any
    conversation: Conversation
    sampling: Sampling
    has_adapter: bool
    without: bool = False
    compares: bool = False

    def run(self) -> int:
        """Until the end of the input."""
        with suppress(ImportError):
            import readline  # noqa: F401 - input() has arrows and a history then
        _tell("/help says what there is; Ctrl-D ends the talk.\n")
        while True:
            try:
                line = input("> ")
            except EOFError:
                _tell("\n")
                return 0
            except KeyboardInterrupt:  # takes the line back, as in a shell
                _tell("\n")
                continue
            if line.strip() in ("/quit", "/exit"):
                return 0
            if line.startswith("/"):
                _tell(self.command(line.strip()) + "\n")
            elif line.strip():
                try:
                    self.answer(line)
                except UserError as error:
                    _tell(f"{error}\n")

    def command(self, line: str) -> str:
        """Do what a line that begins with a slash says; returns what there is to say."""
        if line == "/help":
            return HELP
        if line == "/clear":
            self.conversation.turns.clear()
            return "What was said is forgotten."
        first = line.split()[0]
        if first not in ("/base", "/compare"):
            return f"There is no {first}.\n{HELP}"
        if line != first:
            return f"{first} takes nothing after it."
        if not self.has_adapter:
            return "There is no adapter to take off: this is a whole model."
        if line == "/base":
            self.without, self.compares = not self.without, False
            return "The base answers." if self.without else "Base and adapter answer."
        self.compares = not self.compares
        return "Both answer." if self.compares else "One answers."

    def answer(self, message: str) -> None:
        """Write the answer to a message, or both; the last one is what the talk goes on with."""
        prompt = self.conversation.ask(message)
        left = self.conversation.room(self.model, prompt)
        most = self.sampling.max_new_tokens
        sampling = replace(self.sampling, max_new_tokens=most if left is None else min(most, left))
        ways = (True, False) if self.compares else (self.without,)
        said = ""
        for without in ways:
            if self.has_adapter:
                scale_adapter(self.model, 0.0 if without else 1.0)
            if self.compares:
                _tell("base: " if without else "adapter: ")
            said = answer(self.model, self.tokenizer, prompt, sampling, _tell)
            _tell("\n")
        self.conversation.keep(message, said)


def _tell(text: str) -> None:
    print(text, end="", flush=True)
