"""What can be said of `leanlift train` and `plan` at once, before anything heavy is imported.

A mistyped key, a value of the wrong kind, a file that is not there, a column that is missing: none
of it needs torch, which takes seconds. Only what is wrong for certain is refused here, in the words
that the later checks have; those look at everything, again and in full.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from leanlift.cli.kinds import check_kind
from leanlift.cli.options import WORDS, options, words_of
from leanlift.cli.parsing import check_values, method_of, read_file, read_flags
from leanlift.cli.places import new_settings_file
from leanlift.errors import UserError
from leanlift.format import parse_card
from leanlift.io.places import (
    base_directory,
    check_merged_place,
    checkpoints_in,
    no_room,
)
from leanlift.methods import SFT
from leanlift.rows.first import check_first_rows
from leanlift.rows.mixture import Part
from leanlift.rows.source import check_place
from leanlift.run_arguments import RunArguments
from leanlift.settings import FALSE, TRUE


def check_early(command: str, argv: Sequence[str]) -> None:
    """Look at keys, values, places and first rows.

    Args:
        command: "train" or "plan".
        argv: its arguments.

    Raises:
        UserError: there is something wrong.
    """
    table = options(method_of(argv))
    if table is None:
        return
    given, own = read_flags(command, argv, table)
    if own.fit is not None:
        parse_card(own.fit)
    if command == "plan" and own.save is not None:
        new_settings_file(own.save)
    if own.config is not None:
        given = read_file(own.config, table) | given
    check_values(given, table)
    check_given(command, given)
    for name in WORDS:
        _check_word(name, given.get(name))
    args = _run_arguments(given)
    try:
        _check_base(command, args, bool(given.get("trust_remote_code")))
    except UserError as error:
        if command == "plan":
            base = args.model_name_or_path
            raise UserError(f"the model {base} cannot be planned for: {error}") from None
        raise
    if command == "train":
        _check_places(given)
        _check_rows(given, args.parts(), args.kept_parts())


def _run_arguments(given: Mapping[str, Any]) -> RunArguments:
    """The settings of a run, each of its kind; of a plan, without its rows.

    Raises:
        UserError: one is not.
    """
    own = {field.name for field in fields(RunArguments)}
    found = {key: each for key, each in given.items() if key in own}
    return RunArguments(**found)


def _check_word(name: str, value: Any) -> None:
    """A word of an enumeration, if it is one that is known."""
    known = words_of(name)
    if value is None or not known or str(value) in known:
        return
    close = difflib.get_close_matches(str(value), sorted(known), n=1)
    listed = sorted(known) if len(known) < 6 else [*sorted(known)[:4], "…"]
    meant = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(listed)}."
    raise UserError(f"{name} cannot be {str(value)!r}: {meant}")


def _check_base(command: str, args: RunArguments, trusted: bool) -> None:
    """A directory with a model of a kind that is trained, or what may be a hub name; for a plan a
    config.json alone."""
    base = args.model_name_or_path
    path = Path(base)
    if command == "plan" and path.is_file() and path.suffix == ".json":
        return
    directory = base_directory(base, args.model_revision)
    if directory is not None:
        check_kind(directory, base, trusted)


def check_given(command: str, given: Mapping[str, Any]) -> None:
    """Refuse what is said together and cannot be meant, and a command without what it needs.

    Raises:
        UserError: there is something of it.
    """
    if given.get("load_in_8bit") and given.get("load_in_4bit"):
        raise UserError("load_in_4bit and load_in_8bit exclude each other: choose one.")
    if given.get("density") is not None and given.get("rank_budget") is not None:
        raise UserError("rank_budget takes the place of density: give one of them.")
    if given.get("model_name_or_path") is None:
        raise UserError(
            f"leanlift {command} needs a base: give --model_name_or_path DIRECTORY_OR_HUB_NAME, or "
            "name a file of settings with --config."
        )
    for name in ("fsdp", "deepspeed"):
        if str(given.get(name) or "false").lower() not in (*FALSE, "[]"):
            raise UserError(
                f"{name} cuts a model into parts, and leanlift keeps the whole base in each "
                "process: leave it out, and let accelerate launch start a process per GPU "
                "(--multi_gpu)."
            )
    evaluates = given.get("eval_strategy") not in (None, "no")
    if evaluates and command == "train" and not given.get("eval_dataset_name"):
        raise UserError("eval_strategy wants evaluations: name rows with eval_dataset_name.")
    if command == "train" and not given.get("dataset_name") and not given.get("datasets"):
        raise UserError(
            "leanlift train needs rows: give --dataset_name rows.json, or name a file of settings "
            "with --config."
        )


def _check_places(given: Mapping[str, Any]) -> None:
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


def _check_rows(given: Mapping[str, Any], parts: Sequence[Part], kept: Sequence[Part]) -> None:
    """Whether files of rows are there, and their columns and first rows are of a known shape."""
    method = str(given.get("method") or SFT)
    places = [(part, "train", method) for part in parts]
    if given.get("eval_dataset_name"):
        split = str(given.get("eval_dataset_split") or "")
        places.append((Part(str(given["eval_dataset_name"]), split=split), "eval", method))
    places += [(part, f"keep ({part.path})", SFT) for part in kept]
    text_field = str(given.get("dataset_text_field") or "text")
    as_they_are = given.get("formatting_func") is None and "dataset_kwargs" not in given
    for part, name, how in places:
        check_place(part.path)
        # of a part of the rows, or of the columns, others come first
        if as_they_are and "[" not in part.split and part.columns is None:
            check_first_rows(part.path, name, text_field, how)
