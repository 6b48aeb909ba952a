"""From a YAML file and flags to `RunArguments` and `LiftSFTConfig`.

The options are the fields of both dataclasses under their own names. A YAML file gives values to
any of them, flags override it. Every value of the file is held against the field that it is meant
for, as a flag's is, and no name is guessed: an unknown one is refused with the nearest that exists.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser

from leanlift.cli.help import GROUPS
from leanlift.cli.options import near, take_option
from leanlift.cli.yaml_file import read_settings
from leanlift.defaults import command_defaults
from leanlift.errors import UserError, first_line
from leanlift.training import LiftSFTConfig, RunArguments

HELP = ("--help", "-h", "--help_all")


def asks_for_cpu(argv: list[str]) -> bool:
    """Whether the file or the flags say that the run is one on the CPU."""
    return bool(_given(argv)[0].get("use_cpu"))


def given_settings(argv: list[str]) -> dict[str, Any]:
    """What the file and the flags say, by key; flags override the file.

    Raises:
        UserError: as `parse_train`.
    """
    return dict(_given(argv)[0])


def parse_train(argv: list[str]) -> tuple[RunArguments, LiftSFTConfig]:
    """Arguments from a YAML file and flags.

    Raises:
        UserError: unknown keys, wrong types, or settings that exclude each other.
    """
    parser = build_train_parser(show_all="--help_all" in argv)
    if set(HELP) & set(argv):
        parser.print_help()
        raise SystemExit(0)
    given, settings, argv = _given(argv)
    _check_given(given)
    settings = command_defaults(given) | settings
    for action in parser._actions:
        if action.dest in settings:
            action.required = False
    parser.set_defaults(**settings)
    try:
        args, sft, *_ = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"these settings do not work: {first_line(error)}") from error
    except ImportError as error:
        raise UserError(
            f"a setting needs a package that is missing: {first_line(error)}"
        ) from error
    return args, sft


def build_train_parser(show_all: bool = False) -> HfArgumentParser:
    """The parser of `leanlift train`."""
    parser = _Parser(
        (RunArguments, LiftSFTConfig),
        prog="leanlift train",
        usage="leanlift train --config run.yaml [--key value ...]",
        description="Fine-tune the principal weights of a model. Every key may stand in the YAML "
        "file or be given as a flag; flags override the file.",
        epilog="Every other field of TRL's SFTConfig works too; --help_all lists them.",
        formatter_class=_OneName,
        add_help=False,
        allow_abbrev=False,
    )
    for action in parser._actions:  # a switch without a value is on, also where it may be none
        if getattr(action.type, "__name__", "") == "string_to_bool" and action.nargs is None:
            action.nargs, action.const = "?", True
    parser.add_argument("--fit", help="choose settings for a card of this size, e.g. 8GB")
    parser.add_argument(
        "--dry_run", action="store_true", help="look at everything, plan, and train nothing"
    )
    parser.add_argument("--config", help="a YAML file with any of these keys")
    parser.add_argument(
        "--help", "-h", action="store_true", help="show the options that matter most"
    )
    parser.add_argument("--help_all", action="store_true", help="show every option there is")
    if not show_all:
        own = {field.name for field in dataclasses.fields(RunArguments)}
        grouped = {name for names in GROUPS.values() for name in names}
        shown = {*own, *grouped, "fit", "dry_run", "config", "help", "help_all"}
        for action in parser._actions:
            negative = action.option_strings and action.option_strings[0].startswith("--no")
            if action.dest not in shown or negative:
                action.help = argparse.SUPPRESS
    return parser


class _Parser(HfArgumentParser):
    """A parser whose complaints are those of the rest of the command line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see leanlift train --help.")


class _OneName(argparse.HelpFormatter):
    """One name per option: the dashed spelling and a list of twelve schedulers help nobody."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = action.option_strings[0]
        return (
            name if action.nargs == 0 else f"{name} {'VALUES' if action.nargs == '+' else 'VALUE'}"
        )


def _given(argv: list[str]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """What the file and the flags say, what the file says, and the arguments without it."""
    path, argv = take_option(argv, "--config")
    settings = _read_config(Path(path).expanduser()) if path else {}
    return settings | _flags(argv), settings, argv


def _flags(argv: list[str]) -> dict[str, Any]:
    """What the flags alone say.

    Raises:
        UserError: a flag that does not exist, or a value that it cannot have.
    """
    silent = build_train_parser(show_all=True)
    for action in silent._actions:
        action.default, action.required = argparse.SUPPRESS, False
    silent._defaults.clear()
    found, unknown = silent.parse_known_args(argv)
    if unknown:
        names = [name for action in silent._actions for name in action.option_strings]
        raise UserError(f"{unknown[0]} is no option of leanlift train{near(unknown[0], names)}")
    return vars(found)


def _check_given(given: dict[str, Any]) -> None:
    """Refuse what cannot be meant together."""
    if given.get("load_in_4bit") and given.get("load_in_8bit"):
        raise UserError("load_in_4bit and load_in_8bit exclude each other: choose one.")


# --- the YAML file --------------------------------------------------------------------------


def _read_config(path: Path) -> dict[str, Any]:
    """A YAML mapping of known keys, values as argparse would have them."""
    settings = read_settings(path)
    actions = {
        action.dest: action
        for action in reversed(build_train_parser()._actions)  # a --no_x comes after its --x
        if action.dest not in ("help", "help_all", "config", "fit", "dry_run")
    }
    kinds = {**get_type_hints(RunArguments), **get_type_hints(LiftSFTConfig)}
    for key, value in settings.items():
        if key not in actions:
            raise UserError(f"{path} has an unknown key {key!r}{near(str(key), actions)}")
        settings[key] = _as_option(path, actions[key], kinds.get(key, str), value)
    return settings


def _as_option(path: Path, action: argparse.Action, kind: Any, value: Any) -> Any:
    """A value of the file as the flag of the same name would have it."""
    if value is None or (isinstance(value, dict) and _takes(kind, dict)):
        return value
    if action.dest == "density_pattern" and isinstance(value, dict):
        return value
    if action.nargs == "+" or (isinstance(value, list) and _takes(kind, list)):
        items = value if isinstance(value, list) else [value]
        return [_scalar(path, action, item) for item in items]
    return _scalar(path, action, value)


def _takes(kind: Any, other: type) -> bool:
    """Whether a field's type has room for a dict or a list."""
    return (
        get_origin(kind) is other or kind is other or any(_takes(k, other) for k in get_args(kind))
    )


def _scalar(path: Path, action: argparse.Action, value: Any) -> Any:
    """One value through the field's own conversion: 2e-4 is a string in YAML 1.1."""
    convert: Any = action.type or str
    boolean = getattr(convert, "__name__", "") == "string_to_bool"
    if value is False and action.dest.endswith("_strategy"):
        value = "no"  # which YAML takes for false
    quoted = boolean and isinstance(value, str)
    try:
        if isinstance(value, (dict, list)) or (
            isinstance(value, bool) != boolean and not quoted and convert is not str
        ):
            raise ValueError
        converted = value if isinstance(value, bool) else convert(str(value))
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        raise UserError(f"{path}: {action.dest} cannot be {value!r}.") from None
    if action.choices is not None and converted not in action.choices:
        raise UserError(f"{path}: {action.dest} is one of {list(action.choices)}, not {value!r}.")
    return converted
