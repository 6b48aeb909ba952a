"""The command line's arguments, by argparse alone, before anything heavy is imported.

`Parser` is what every command is parsed by. `train` and `plan` take all settings as options: those
of the table in `leanlift.cli.options`, and a few of their own (`add_own`). They are parsed here for
the early look, and again, with the libraries' own declarations, by `leanlift.cli.settings`.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from leanlift.cli.options import Option
from leanlift.cli.yaml_file import read_settings
from leanlift.errors import UserError
from leanlift.methods import METHODS, SFT
from leanlift.settings import FORMER_NAMES, NOT_TAKEN, Kind, todays_names

HELP = ("help", "help_all")
OWN = ("config", "fit", "dry_run", "save", "plot", "json", "cpu", "card", "table", "longest", *HELP)
"""Options of `train` and `plan` that are no settings."""


class Parser(argparse.ArgumentParser):
    """Options under their whole names alone: a new one would change what a shortened one means.
    What is wrong with them is one sentence, like everything else that is."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help.")


def take_switch(argv: Sequence[str], *names: str) -> tuple[bool, list[str]]:
    """Whether a switch is among the arguments, and the others."""
    parser = Parser(prog="leanlift", add_help=False)
    parser.add_argument(*names, action="store_true", dest="found")
    found, rest = parser.parse_known_args(list(argv))
    return bool(found.found), rest


def without(argv: Sequence[str], name: str) -> list[str]:
    """The arguments but for an option that has a value."""
    parser = Parser(prog="leanlift", add_help=False)
    parser.add_argument(*spellings(name))
    return parser.parse_known_args(list(argv))[1]


def asks_for_help(argv: Sequence[str]) -> tuple[bool, bool]:
    """Whether help is asked for, and whether all of it."""
    some, rest = take_switch(argv, "--help", "-h")
    every, _ = take_switch(rest, "--help_all")
    return some or every, every


def method_of(argv: Sequence[str]) -> str:
    """The method that a command line, or the file that it names, asks for; where it is none, which
    is said later, or none is said, the first."""
    parser = Parser(prog="leanlift", add_help=False)
    parser.add_argument("--method")
    parser.add_argument("--config")
    try:
        asked = parser.parse_known_args(list(argv))[0]
        method = asked.method
        if method is None and asked.config is not None:
            method = read_settings(Path(asked.config).expanduser()).get("method")
    except UserError:
        return SFT
    return method if isinstance(method, str) and method in METHODS else SFT


# --- train and plan -------------------------------------------------------------------------


def add_own(parser: argparse.ArgumentParser, command: str) -> None:
    """The options of `train` or `plan` that are no settings."""
    add = parser.add_argument
    add("--config", type=_something, help="a YAML file with any of these keys; flags override it")
    add("--fit", type=_something, help="choose settings with which a card of this size will do")
    if command == "train":
        add("--dry_run", action="store_true", help="look at everything, plan, and train nothing")
    else:
        add("--save", type=_something, help="write the settings to this file")
        add("--plot", type=_something, help="also draw the bytes as a stacked bar")
        add("--json", action="store_true", help="print JSON")
        add("--table", action="store_true", help="what settings need and take, by card")
        add("--card", type=_something, help="say how long a step takes on it, such as rtx4090")
        add("--cpu", action="store_true", help="plan for a run on the CPU")
    add("--help", "-h", action="store_true", help="show the options that matter most")
    add("--help_all", action="store_true", help="show every option there is")


def add_settings(parser: argparse.ArgumentParser, table: Iterable[Option]) -> None:
    """An option for each setting, in both spellings; what is not given is not in the result.

    A switch without a value is on, and one that is on by itself has a `--no_` to turn it off. A
    setting has an option under its former name too.
    """
    former = {today: name for name, today in FORMER_NAMES.items()}
    for option in table:
        names = [option.name, *([former[option.name]] if option.name in former else [])]
        for name in names:
            _add(parser, option, name)
            if option.kind.switch and option.default == "True":
                parser.add_argument(
                    *spellings(f"no_{name}"),
                    action="store_false",
                    dest=name,
                    default=argparse.SUPPRESS,
                    help=f"turns {name} off",
                )


def _add(parser: argparse.ArgumentParser, option: Option, name: str) -> None:
    more: dict[str, Any] = {}
    if option.kind.switch:
        more = {"nargs": "?", "const": True}
    elif option.kind.many:
        more = {"nargs": "+"}
    parser.add_argument(
        *spellings(name),
        dest=name,
        type=str if option.kind.many else _reader(option.kind),
        default=argparse.SUPPRESS,
        help=f"the former name of {option.name}" if name != option.name else option.help,
        **more,
    )


def spellings(name: str) -> list[str]:
    """A flag with underscores, and with dashes."""
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def _reader(kind: Kind) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return _taken("", kind, text)
        except UserError as error:  # argparse puts the option before it
            raise argparse.ArgumentTypeError(str(error).strip()) from None

    return read


def _taken(name: str, kind: Kind, given: Any) -> Any:
    try:
        return kind.take(given)
    except NOT_TAKEN:
        raise UserError(f"{name} cannot be {given!r:.80}: expected {kind.what}.") from None


def _something(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("needs a value.")
    return text


def read_flags(
    command: str,
    argv: Sequence[str],
    table: Mapping[str, Option],
    say: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Any], argparse.Namespace]:
    """What flags say of settings, by today's names, and the command's own options.

    Args:
        command: "train" or "plan".
        argv: its arguments.
        table: what there is to be set.
        say: is told of former names.

    Raises:
        UserError: a flag that does not exist, lacks its value, or has one that it cannot have.
    """
    parser = Parser(prog=f"leanlift {command}", add_help=False, exit_on_error=False)
    add_settings(parser, table.values())
    add_own(parser, command)
    longest, argv = _asks_for_the_longest(argv) if command == "plan" else (False, list(argv))
    try:
        found, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(_worded(error)) from None
    if rest:
        known = [name for action in parser._actions for name in action.option_strings]
        raise UserError(_stray(command, rest[0], known))
    own = argparse.Namespace(**{key: each for key, each in vars(found).items() if key in OWN})
    if command == "plan":
        own.longest = longest
        if (longest or own.table) and own.save is not None:
            many = "--max_length max" if longest else "--table"
            raise UserError(f"{many} plans many settings, of which --save cannot write one.")
        if longest and own.table:
            raise UserError("--table and --max_length max are two tables: ask for one at a time.")
    given = {key: each for key, each in vars(found).items() if key not in OWN}
    given = todays_names(given, "the command line", say)
    for name, each in given.items():
        if isinstance(each, list):
            given[name] = _taken(f"--{name}", table[name].kind, each)
    return given, own


def _asks_for_the_longest(argv: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether `--max_length max` is among the arguments, and the others."""
    rest = list(argv)
    for flag in spellings("max_length"):
        if f"{flag}=max" in rest:
            rest.remove(f"{flag}=max")
        for at in range(len(rest) - 1):
            if rest[at : at + 2] == [flag, "max"]:
                del rest[at : at + 2]
                break
    return rest != list(argv), rest


def _worded(error: argparse.ArgumentError) -> str:
    flag, said = (error.argument_name or "").split("/")[0], error.message
    if said.startswith("expected"):
        return f"{flag} needs a value."
    if said.startswith("ignored explicit argument"):
        return f"{flag} takes no value: leave what comes after = out."
    return f"{flag} {said.rstrip('.')}."


def _stray(command: str, token: str, known: Iterable[str]) -> str:
    if token.endswith((".yaml", ".yml")):
        return f"a file of settings is named with --config: leanlift {command} --config {token}."
    if not token.startswith("-"):
        return (
            f"{token} stands alone: leanlift {command} takes a base as --model_name_or_path, rows "
            "as --dataset_name, a file of settings as --config."
        )
    return f"{token} is no option of leanlift {command}{near(token, known)}"


# --- the file -------------------------------------------------------------------------------


def read_file(
    given: str, table: Mapping[str, Option], say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """What a file of settings says, by today's names.

    Raises:
        UserError: as `read_settings`; a key that does not exist, a setting under two names, or a
            value that it cannot have.
    """
    path = Path(given).expanduser()
    settings = todays_names(read_settings(path), str(path), say)
    for key, value in settings.items():
        if key not in table:
            raise UserError(f"{path} has an unknown key {key!r}{near(str(key), table)}")
        if value is not None:
            settings[key] = _taken(f"{path}: {key}", table[key].kind, value)
    return settings


def check_values(given: Mapping[str, Any], table: Mapping[str, Option]) -> None:
    """Hold what is given against what it may be; nothing is what a class makes of it.

    Raises:
        UserError: a value out of range, or a word that is none.
    """
    for name, value in given.items():
        if value is not None:
            table[name].kind.check(name, value)


# --- names ----------------------------------------------------------------------------------

MEANT = {
    "batch_size": "per_device_train_batch_size",
    "data": "dataset_name",
    "dataset": "dataset_name",
    "epochs": "num_train_epochs",
    "lora_r": "rank_budget",
    "lr": "learning_rate",
    "model": "model_name_or_path",
    "output": "output_dir",
    "r": "rank_budget",
    "rank": "rank_budget",
    "save_dir": "output_dir",
    "steps": "max_steps",
}
"""Names that other tools have for the same."""


def near(wrong: str, names: Iterable[str]) -> str:
    """The end of a sentence about a name that does not exist."""
    wrong, names = wrong.partition("=")[0], list(names)
    dashes = wrong[: len(wrong) - len(wrong.lstrip("-"))]
    meant = MEANT.get(wrong.lstrip("-").replace("-", "_").lower())
    if meant is not None and f"{dashes}{meant}" in names:
        return f": did you mean {dashes}{meant}?"
    close = difflib.get_close_matches(wrong, names, n=1, cutoff=0.7)
    return f": did you mean {close[0]}?" if close else ": see leanlift train --help_all."
