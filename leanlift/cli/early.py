"""What can be said of `leanlift train` and `plan` at once, before anything heavy is imported.

A mistyped key, a value of the wrong kind, a file that is not there, a column that is missing: none
of it needs torch, which takes seconds. Only what is wrong for certain is refused here, in the words
that the later checks have; those look at everything, again and in full.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from leanlift.cli.kinds import check_kind
from leanlift.cli.options import COMMAND, FALSE, TRUE, Option, flags, near, options
from leanlift.cli.yaml_file import read_settings
from leanlift.errors import UserError
from leanlift.numbers import NUMBERS, check_number
from leanlift.places import (
    WEIGHTS_NAME,
    base_directory,
    check_merged_place,
    checkpoints_in,
    no_room,
)
from leanlift.rows.examples import ExampleReader
from leanlift.rows.source import check_place, read_json_rows

LOOKED_AT = 20
"""First rows that are converted."""

LARGE = 64 * 2**20
"""Bytes from which a JSON list, which is read as a whole, is left to the later checks."""

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
    given = _read_flags(argv, table)
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
    output = Path(str(given.get("output_dir") or "leanlift-output"))
    if given.get("merged_dir"):
        check_merged_place(str(Path(str(given["merged_dir"])).expanduser()), output)
    resumes = given.get("resume_from_checkpoint")
    if not resumes or str(resumes).lower() == "false":
        steps = checkpoints_in(output) if output.is_dir() else []
        if steps or output.is_file() or (output / WEIGHTS_NAME).exists():
            raise no_room(output, bool(steps))
    elif str(resumes).lower() != "true" and not Path(str(resumes)).expanduser().is_dir():
        raise UserError(
            f"{resumes} is no checkpoint: expected a directory checkpoint-N of a training run, or "
            "true for the last one in output_dir."
        )
    template = given.get("chat_template_path")
    if (
        template
        and str(template).endswith(".jinja")
        and not Path(str(template)).expanduser().is_file()
    ):
        raise UserError(f"the chat template {template} does not exist: expected a .jinja file.")


def _check_rows(given: dict[str, Any]) -> None:
    """Whether files of rows are there, and their columns and first rows are of a known shape."""
    for key, name in (("dataset_name", "train"), ("eval_dataset_name", "eval")):
        if not given.get(key):
            continue
        path, kind = check_place(str(given[key]))
        if kind != "json" or "dataset_kwargs" in given:
            continue
        whole = path.suffix != ".jsonl"
        if whole and path.stat().st_size > LARGE:
            continue
        rows = list(islice(read_json_rows(path), None if whole else LOOKED_AT))
        if not rows:
            raise UserError(f"{given[key]} holds no rows: there is nothing to train on.")
        _read_rows(rows, name, str(given.get("dataset_text_field") or "text"))


def _read_rows(rows: Iterable[dict[str, Any]], name: str, text_field: str) -> None:
    rows = list(rows)
    columns = {column for row in rows for column in row}
    if "input_ids" in columns:
        return
    reader = ExampleReader(name, sorted(columns), True, text_field)
    for number, row in enumerate(rows[:LOOKED_AT]):
        reader({column: value for column, value in row.items() if value is not None}, number)


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


def _read_flags(argv: list[str], table: dict[str, Option]) -> dict[str, Any]:
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
            raise UserError(_stray(token, known))
        if name in ("help", "help_all", "dry_run"):
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


def _stray(token: str, known: Iterable[str]) -> str:
    if token.endswith((".yaml", ".yml")):
        return f"a file of settings is named with --config: leanlift train --config {token}."
    return f"{token} is no option of leanlift train{near(token, known)}"


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
