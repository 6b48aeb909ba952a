"""The parser of `leanlift chat`, and what can be refused before anything is imported."""

from __future__ import annotations

import argparse
import math
import sys
from os.path import expanduser
from typing import Any

from leanlift.cli.measure import add_held
from leanlift.errors import UserError
from leanlift.io.places import CONFIG_NAME, base_directory, check_adapter_place, look_at
from leanlift.rows.examples import MESSAGE


def add_chat(commands: Any) -> None:
    """The parser of the command."""
    parser = commands.add_parser(
        "chat",
        help="talk to a run, an adapter, a base or a merged model in the terminal",
        description="Answers come word by word, in the chat template that the model has. Ctrl-C "
        "ends an answer, Ctrl-D the talk; /help says what else there is, such as /base, which "
        "takes the adapter off, and /compare, which answers with it and without. From a pipe, "
        "all of the input is one message, and the answer alone is printed.",
    )
    add_model(parser)
    said = parser.add_argument_group("what is said")
    said.add_argument("--system", help="an instruction before the first message")
    said.add_argument(
        "--prompt",
        help="what a message becomes where the tokenizer has no chat template: a text with "
        f"{MESSAGE} in it, or alpaca, as rows of instruction and output are trained; default: the "
        "message as it is",
    )
    said.add_argument("--base", action="store_true", help="begin without the adapter")
    drawn = parser.add_argument_group("answers")
    drawn.add_argument(
        "--temperature",
        type=float,
        help="0 takes the likeliest token each time; default, here and below: what the model's "
        "generation config says",
    )
    drawn.add_argument("--top_p", type=float, help="draw of the likeliest tokens of this share")
    drawn.add_argument("--top_k", type=int, help="draw of so many likeliest tokens")
    drawn.add_argument("--seed", type=int, help="of what is drawn")
    drawn.add_argument(
        "--max_new_tokens", type=int, default=512, help="of an answer, at most (512)"
    )
    parser.set_defaults(run=_chat)


def add_model(parser: Any) -> None:
    """What answers, and how it is held: of `chat` and of `serve`."""
    parser.add_argument(
        "model",
        type=expanduser,
        help="a run's output_dir, an adapter, a checkpoint directory, or a name on the hub",
    )
    model = parser.add_argument_group("the model")
    model.add_argument(
        "--model_name_or_path",
        type=expanduser,
        help="the base of an adapter; default: the one that it was trained on",
    )
    add_held(model)


def _chat(options: argparse.Namespace) -> int:
    _check(options)
    options.adapter = adapter_of(options)
    if sys.stdin.isatty():  # someone waits
        print(f"Loading {options.model} …", file=sys.stderr, flush=True)
    from leanlift.cli.talk import chat_command

    return chat_command(options)


def _check(options: argparse.Namespace) -> None:
    """Refuse sizes and texts that can be no such."""
    for name, least, most in (
        ("temperature", 0, None),
        ("top_p", 0, 1),
        ("top_k", 1, None),
        ("max_new_tokens", 1, None),
        ("seed", 0, 2**32 - 1),
    ):
        given = getattr(options, name)
        if given is None:
            continue
        if not least <= given < math.inf or (most is not None and given > most):  # nor NaN
            wanted = f"from {least} to {most}" if most is not None else f"of at least {least}"
            said = f"{given:g}" if isinstance(given, float) else given
            raise UserError(f"expected a {name} {wanted}, got {said}.")
    if options.prompt not in (None, "alpaca") and MESSAGE not in options.prompt:
        raise UserError(
            f"--prompt has no place for the message: expected alpaca, or a text with {MESSAGE}."
        )


def adapter_of(options: argparse.Namespace) -> str | None:
    """What was named, if it is an adapter; None where it is a model: it takes the place of the base
    then.

    Raises:
        UserError: it can be neither, or a base or --base is given beside a model.
    """
    found = look_at(options.model)
    if found.kind == "adapter" or (found.kind == "none" and _is_one_on_the_hub(options.model)):
        check_adapter_place(options.model)
        if options.model_name_or_path is not None:
            base_directory(options.model_name_or_path)
        return str(options.model)
    if found.kind not in ("model", "none"):
        raise UserError(
            f"{options.model} is {found.words}: expected a run's output_dir, an adapter, a "
            "checkpoint directory, or a name on the hub."
        )
    for given, name in ((options.model_name_or_path, "model_name_or_path"), (options.base, "base")):
        if given:
            raise UserError(
                f"--{name} is about an adapter, and {options.model} is a model: leave it out."
            )
    base_directory(options.model)
    options.model_name_or_path = options.model
    return None


def _is_one_on_the_hub(name: str) -> bool:
    """Whether a name that is no path is that of an adapter."""
    if name.startswith((".", "~", "/")) or name.count("/") != 1:
        return False
    from leanlift.io.hub import has_file

    return has_file(name, CONFIG_NAME)
