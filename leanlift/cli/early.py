"""What can be said of `leanlift train` and `plan` at once, before anything heavy is imported.

A mistyped key, a value of the wrong kind, a file that is not there, a column that is missing: none
of it needs torch, which takes seconds. Only what is wrong for certain is refused here, in the words
that the later checks have; those look at everything, again and in full.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from leanlift.cli.kinds import check_kind
from leanlift.cli.options import COMMAND, WORDS, Option, flags, near, options, take_option, words_of
from leanlift.cli.places import new_settings_file
from leanlift.cli.yaml_file import read_settings
from leanlift.errors import UserError
from leanlift.format import parse_card
from leanlift.io.places import (
    base_directory,
    check_merged_place,
    checkpoints_in,
    no_room,
)
from leanlift.numbers import FALSE, NUMBERS, TRUE, check_number
from leanlift.rows.first import check_first_rows
from leanlift.rows.source import check_place

MASK = ("density", "rank_budget", "approx_rank", "refresh_interval", "refresh_margin", "selector")
"""Fields of `LiftConfig` that it holds against each other."""


CHOICES = {
    "bnb_4bit_quant_type": ("nf4", "fp4"),
    "dtype": ("bfloat16", "float16", "float32"),
    "log_format": ("auto", "rich", "plain", "json"),
    "merge_onto": ("original", "quantized"),
    "ops": ("auto", "torch", "triton"),
    "values_dtype": ("float32", "bfloat16"),
}
"""What our own settings may be, where that is a word of a few."""


def check_early(command: str, argv: list[str]) -> dict[str, Any]:
    """Look at keys, values, places and first rows.

    Args:
        command: "train" or "plan".
        argv: its arguments.

    Returns:
        What is said of the mask, for `LiftConfig` to look at: that imports torch.

    Raises:
        UserError: there is something wrong.
    """
    table = options()
    if table is None:
        return {}
    if command == "plan":
        argv = _without_plans_own(argv)
    card, argv = take_option(argv, "--fit")
    if card is not None:
        parse_card(card)
    given = _read_flags(command, argv, table)
    if "config" in given:
        given = _read_file(Path(str(given["config"])).expanduser(), table) | given
    _check_required(command, given)
    for name in NUMBERS:
        value = _number(given.get(name), table.get(name))
        if value is not None:
            check_number(name, value)
    for name, words in CHOICES.items():
        if given.get(name) is not None and str(given[name]) not in words:
            listed = " or ".join(words) if len(words) == 2 else f"one of {', '.join(words)}"
            raise UserError(f"expected {name} as {listed}, got {given[name]!r}.")
    for name in WORDS:
        _check_word(name, given.get(name))
    base = str(given["model_name_or_path"])
    try:
        _check_base(command, base, given)
    except UserError as error:
        if command == "plan":
            raise UserError(f"the model {base} cannot be planned for: {error}") from None
        raise
    if command == "train":
        _check_places(given)
        _check_rows(given)
    return _mask(given, table)


def _without_plans_own(argv: list[str]) -> list[str]:
    """The arguments that `plan` shares with `train`; its place for settings is looked at."""
    _, argv = take_option([each for each in argv if each not in ("--json", "--cpu")], "--plot")
    place, argv = take_option(argv, "--save")
    if place is not None:
        new_settings_file(place)
    return argv


def _check_word(name: str, value: Any) -> None:
    """A word of an enumeration, if it is one that is known."""
    known = words_of(name)
    if value is None or not known or value is False or str(value) in known:
        return
    close = difflib.get_close_matches(str(value), sorted(known), n=1)
    listed = sorted(known) if len(known) < 6 else [*sorted(known)[:4], "…"]
    meant = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(listed)}."
    raise UserError(f"{name} cannot be {str(value)!r}: {meant}")


def _check_base(command: str, base: str, given: dict[str, Any]) -> None:
    """A directory with a model of a kind that is trained, or what may be a hub name; for a plan a
    config.json alone."""
    path = Path(base).expanduser()
    if command == "plan" and path.is_file() and path.suffix == ".json":
        return
    directory = base_directory(base, given.get("model_revision"))
    if directory is not None:
        check_kind(directory, base, _true(given, "trust_remote_code"))


def _check_required(command: str, given: dict[str, Any]) -> None:
    if _true(given, "load_in_8bit") and _true(given, "load_in_4bit"):
        raise UserError("load_in_4bit and load_in_8bit exclude each other: choose one.")
    if given.get("density") is not None and given.get("rank_budget") is not None:
        raise UserError("rank_budget takes the place of density: give one of them.")
    if "model_name_or_path" not in given:
        raise UserError(
            f"leanlift {command} needs a base: give --model_name_or_path DIRECTORY_OR_HUB_NAME, or "
            "name a file of settings with --config."
        )
    evaluates = str(given.get("eval_strategy") or "no") not in ("no", "False")
    if evaluates and command == "train" and not given.get("eval_dataset_name"):
        raise UserError("eval_strategy wants evaluations: name rows with eval_dataset_name.")
    if command == "train" and "dataset_name" not in given:
        raise UserError(
            "leanlift train needs rows: give --dataset_name rows.json, or name a file of settings "
            "with --config."
        )


def _check_places(given: dict[str, Any]) -> None:
    output = Path(str(given.get("output_dir") or "leanlift-output")).expanduser()
    if given.get("merged_dir"):
        check_merged_place(str(Path(str(given["merged_dir"])).expanduser()), output)
    place = next(path for path in (output, *output.absolute().parents) if path.exists())
    if place.is_dir() and not os.access(place, os.W_OK):
        raise UserError(f"output_dir {output} cannot be written: {place} is not yours to write to.")
    resumes = str(given.get("resume_from_checkpoint") or "false")
    if resumes.lower() in FALSE:
        steps = checkpoints_in(output) if output.is_dir() else []
        taken = output.is_dir() and any(_is_result(entry) for entry in output.iterdir())
        if output.is_file() or taken:
            raise no_room(output, bool(steps))
    elif resumes.lower() not in TRUE and not Path(resumes).expanduser().is_dir():
        raise UserError(
            f"{resumes} is no checkpoint: expected a directory checkpoint-N of a training run, or "
            "true for the last one in output_dir."
        )
    template = str(given.get("chat_template_path") or "")
    on_hub = template.count("/") == 1 and not template.startswith((".", "~", "/"))
    wanted = template and (template.endswith(".jinja") or not on_hub)
    if wanted and not Path(template).expanduser().exists():
        raise UserError(
            f"the chat template {template} does not exist: expected a .jinja file, a tokenizer's "
            "directory, or a name on the hub."
        )


def _is_result(entry: Path) -> bool:
    """Whether an entry of an output directory is more than what a run that was cut off has left."""
    return not entry.name.startswith(".") and not entry.name.endswith(".partial")


def _check_rows(given: dict[str, Any]) -> None:
    """Whether files of rows are there, and their columns and first rows are of a known shape."""
    text_field = str(given.get("dataset_text_field") or "text")
    for key, name in (("dataset_name", "train"), ("eval_dataset_name", "eval")):
        if not given.get(key):
            continue
        source, part = str(given[key]), str(given.get(key.replace("_name", "_split")) or "")
        check_place(source)
        if "dataset_kwargs" not in given and "[" not in part:  # of a part other rows come first
            check_first_rows(source, name, text_field)


def _mask(given: dict[str, Any], table: dict[str, Option]) -> dict[str, Any]:
    numbers = {name: _number(given.get(name), table[name]) for name in MASK if name != "selector"}
    known = {name: value for name, value in numbers.items() if value is not None}
    return known | ({"selector": str(given["selector"])} if "selector" in given else {})


def _number(value: Any, option: Option | None) -> Any:
    """A given value as the number it stands for; None where there is none."""
    if value is None or option is None or not {"int", "float"} & set(option.kinds):
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    for kind in (int, float):
        if kind.__name__ in option.kinds:
            try:
                return kind(value)
            except (ValueError, OverflowError):
                continue
    return None


def _true(given: dict[str, Any], name: str) -> bool:
    return str(given.get(name, "false")).lower() in TRUE


# --- flags and file -------------------------------------------------------------------------


def _read_flags(command: str, argv: list[str], table: dict[str, Option]) -> dict[str, Any]:
    """What flags say, as texts; a switch without a value is True.

    Raises:
        UserError: a flag that does not exist, lacks its value, or has one that it cannot have.
    """
    given: dict[str, Any] = {}
    known, pending = set(flags()), list(reversed(argv))

    def following() -> bool:
        return bool(pending) and not pending[-1].startswith("--")

    while pending:
        token = pending.pop()
        flag, equals, text = token.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not token.startswith("--") or flag not in known:
            raise UserError(_stray(command, token, known))
        if name in ("help", "help_all", "dry_run"):
            if equals:
                raise UserError(f"{flag} takes no value: leave {equals}{text} out.")
            given[name] = True
            continue
        if name not in table and name not in COMMAND:
            given[name.removeprefix("no_")] = False
            continue
        option = table.get(name)
        if option is not None and option.is_bool and not equals and not following():
            given[name] = True
            continue
        if not equals:
            if not following():
                raise UserError(f"{flag} needs a value.")
            text = pending.pop()
        if option is not None and option.takes_many:
            values = [text]
            while following():
                values.append(pending.pop())
            given[name] = values
            continue
        if option is not None and option.refuses(text):
            raise UserError(f"{flag} cannot be {text!r}: expected {_expected(option)}.")
        given[name] = text.lower() in TRUE if option is not None and option.is_bool else text
    return given


def _stray(command: str, token: str, known: Iterable[str]) -> str:
    if token.endswith((".yaml", ".yml")):
        return f"a file of settings is named with --config: leanlift {command} --config {token}."
    if not token.startswith("-"):
        return (
            f"{token} stands alone: leanlift {command} takes a base as --model_name_or_path, rows "
            "as --dataset_name, a file of settings as --config."
        )
    return f"{token} is no option of leanlift {command}{near(token, known)}"


def _expected(option: Option) -> str:
    kind = option.kinds[0]
    words = {"int": "a whole number", "float": "a number"}
    return words.get(kind, f"{TRUE[1]} or {FALSE[1]}")


def _read_file(path: Path, table: dict[str, Option]) -> dict[str, Any]:
    """What the file of settings says.

    Raises:
        UserError: as `read_settings`; a key that does not exist, or a value that it cannot have.
    """
    settings = read_settings(path)
    for key, value in settings.items():
        option = table.get(key)
        if option is None:
            raise UserError(f"{path} has an unknown key {key!r}{near(str(key), table)}")
        if value is None or not option.kinds or len(option.kinds) != 1:
            continue
        scalar = option.kinds[0] in ("bool", "int", "float")
        nested = isinstance(value, (dict, list)) or isinstance(value, bool) != option.is_bool
        if scalar and (
            (nested and not (option.is_bool and isinstance(value, str)))
            or option.refuses(json.dumps(value) if isinstance(value, bool) else str(value))
        ):
            raise UserError(f"{path}: {key} cannot be {value!r}.")
    return settings
