"""From a YAML file and flags to `RunArguments` and `LiftSFTConfig`.

The options are the fields of both dataclasses under their own names. A YAML file gives values to
any of them, flags override it. Every value of the file is held against the field that it is meant
for, as a flag's is, and no name is guessed: an unknown one is refused with the nearest that exists.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache, partial
from typing import Any, get_args, get_type_hints

from transformers import HfArgumentParser

from leanlift.cli.early import check_given
from leanlift.cli.options import MANY, Option, kind_of_types, run_options
from leanlift.cli.parsing import (
    Parser,
    add_own,
    add_settings,
    check_values,
    method_of,
    read_file,
    read_flags,
)
from leanlift.defaults import command_defaults
from leanlift.errors import UserError, first_line
from leanlift.methods import SFT
from leanlift.settings import Kind, one_of, optional
from leanlift.training import LiftSFTConfig, RunArguments
from leanlift.training.arguments import loop_class

logger = logging.getLogger("leanlift")

ROWS_OF_A_PLAN = "rows.json"
"""What a plan takes for the rows where none are named: it reads none."""


@dataclass(frozen=True)
class Asked:
    """What a command line asks for.

    Attributes:
        args, sft: the settings, with the command's defaults.
        given: those that the file and the flags name, and what they say; flags override the file.
        own: the options of the command that are no settings.
    """

    args: RunArguments
    sft: LiftSFTConfig
    given: dict[str, Any]
    own: argparse.Namespace


def parse_train(argv: Sequence[str]) -> tuple[RunArguments, LiftSFTConfig]:
    """As `read_command`: the settings alone, of `leanlift train`."""
    asked = read_command("train", argv)
    return asked.args, asked.sft


def read_command(command: str, argv: Sequence[str]) -> Asked:
    """Settings from a YAML file and flags.

    Args:
        command: "train" or "plan".
        argv: its arguments.

    Raises:
        UserError: unknown keys, wrong values, or settings that exclude each other.
    """
    method = method_of(argv)
    table = table_of_classes(method)
    said: list[str] = []
    flags, own = read_flags(command, argv, table, said.append)
    if own.help or own.help_all:
        build_parser(command, method).print_help()
        raise SystemExit(0)
    given = {} if own.config is None else read_file(own.config, table, said.append)
    given |= flags
    check_values(given, table)
    check_given(command, given)
    for line in said:
        logger.warning("%s", line)
    values = command_defaults(given) | given
    if command == "plan" and not values.get("datasets"):
        values.setdefault("dataset_name", ROWS_OF_A_PLAN)
    run = {field.name for field in fields(RunArguments)}
    try:
        args = RunArguments(**{key: value for key, value in values.items() if key in run})
        loop = {key: value for key, value in values.items() if key not in run}
        sft = loop_class(method)(**loop)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"these settings do not work: {first_line(error)}") from error
    except ImportError as error:
        raise UserError(
            f"a setting needs a package that is missing: {first_line(error)}"
        ) from error
    return Asked(args, sft, given, own)


def build_parser(command: str, method: str = SFT) -> argparse.ArgumentParser:
    """The parser of `leanlift train` or `plan`, with the libraries' own help."""
    parser = Parser(
        prog=f"leanlift {command}",
        usage=f"leanlift {command} --config run.yaml [--key value ...]",
        description="Every key may stand in the YAML file or be given as a flag; flags override "
        "the file.",
        formatter_class=_OneName,
        add_help=False,
    )
    add_settings(parser, table_of_classes(method).values())
    add_own(parser, command)
    return parser


@cache
def table_of_classes(method: str = SFT) -> dict[str, Option]:
    """Every setting by name, as the classes have it: their annotations as transformers reads them.
    `leanlift.cli.options.options` has the same of their sources."""
    kind_of_loop = loop_class(method)
    hints = get_type_hints(kind_of_loop)
    found: dict[str, Option] = {}
    for action in HfArgumentParser((kind_of_loop,), add_help=False)._actions:
        if action.dest in found:  # the --no_ of a switch
            continue
        default = None if action.required else str(action.default)
        kind = _kind(action, hints[action.dest])
        found[action.dest] = Option(action.dest, kind, default, action.help or "")
    return found | run_options()


def _kind(action: argparse.Action, hint: Any) -> Kind:
    convert: Any = action.type
    name = getattr(convert, "__name__", "").replace("string_to_bool", "bool")
    or_none = type(None) in get_args(hint)
    if action.choices is not None:
        words = one_of(*map(str, action.choices))
        return optional(words) if or_none else words
    if action.nargs == "+":
        return Kind(MANY.what, MANY.holds, partial(_converted, convert), many=True)
    types = (name,) if name != "str" or set(get_args(hint)) <= {str, type(None)} else ()
    return kind_of_types(action.dest, types, or_none)


def _converted(convert: Callable[[Any], Any], given: Any) -> list[Any]:
    return [convert(each) for each in MANY.take(given)]


class _OneName(argparse.HelpFormatter):
    """One name per option: the dashed spelling helps nobody."""

    def __init__(self, prog: str, **more: Any) -> None:
        super().__init__(prog, **{**more, "max_help_position": 34, "width": 100})

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = action.option_strings[0]
        return (
            name if action.nargs == 0 else f"{name} {'VALUES' if action.nargs == '+' else 'VALUE'}"
        )
