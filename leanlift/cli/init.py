"""`leanlift init [--model M --data ROWS --card 8GB --purpose answers --output run.yaml --yes]`.

Looks at the rows and the card, proposes settings, and writes them with their reasons. What is not
given is asked for on a terminal. Where there is none, nothing is guessed: one sentence says what is
missing. What can be wrong about the places is said before anything is asked or read.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from leanlift.cli.places import new_settings_file
from leanlift.cli.trying import Trying
from leanlift.errors import UserError
from leanlift.format import parse_card, short_name, size
from leanlift.io.places import base_directory
from leanlift.rows.source import check_place

PURPOSES = {
    "answers": "answer as the rows do: a task, a subject",
    "style": "answer as before, in another style or format",
    "text": "continue texts like these",
}
CPU = "cpu"

EPILOG = """example:
  leanlift init --model Qwen/Qwen2.5-7B --data rows.jsonl --card 8GB --yes

Nothing is trained, and nothing but the file is written."""

Ask = Callable[[str, str, str | None], str]
"""(question, flag, default) -> answer."""


def _init(given: argparse.Namespace) -> int:
    """Ask, look, propose, write."""
    place = new_settings_file(given.output)
    ask = _asker(given.yes)
    if given.purpose is not None:
        _check_purpose(given.purpose)
    if given.card is not None:
        _gib(given.card)
    model = given.model or ask("Model (a directory, or a name on the hub)", "--model", None)
    kinds = ".json, .jsonl, .csv, .parquet, .txt"
    data = given.data or ask(f"Rows ({kinds}, or a hub name)", "--data", None)
    base_directory(model)
    check_place(data)
    purpose = given.purpose or ask(_choices(), "--purpose", "answers")
    _check_purpose(purpose)
    card = given.card or _this_card()
    alone = (
        CPU if given.yes or sys.stdin.isatty() else None
    )  # the only thing that is sure to be there
    card = card or ask("Memory of the card, such as 8GB, or cpu", "--card", alone)
    _propose(model, data, purpose, _gib(card), place, given.output_dir)
    return 0


def _propose(
    model: str, data: str, purpose: str, card: float | None, place: Path, output_dir: str | None
) -> None:
    """The slow part: reads rows, plans, writes."""
    name = short_name(model)
    runs = output_dir or f"runs/{Path(name).name}-{Path(data).stem}".lower()
    with Trying() as trying:
        trying(f"reading {Path(data).name}")
        from leanlift.training.look import look  # seconds, of which something is seen
        from leanlift.training.propose import propose
        from leanlift.training.recipe import write_recipe

        found = look(model, data)
        made = propose(model, data, found, purpose, card, runs, trying)
    print("\n".join([*found.lines(), *made.lines(found)]))
    room = "the CPU" if card is None else f"a card of {card:g} GB"
    head = [
        f"{name} on {found.name}, to {PURPOSES[purpose]}; for {room}, planned to need "
        f"{size(made.plan.needed)}.",
        "Made by leanlift init; 'leanlift train --help' says what each key means.",
    ]
    write_recipe(place, head, made.sections)
    print(f"\nWrote {place}. Look at it, then at the run without training, then train:")
    print(f"    leanlift train --config {place} --dry_run")
    print(f"    leanlift train --config {place}")


def add_init(commands: Any) -> None:
    """The parser of the command."""
    parser = commands.add_parser(
        "init",
        help="look at rows and card, propose settings",
        description="Look at rows and a card, propose settings, and write them as a file for "
        "'leanlift train'. What is not given is asked for.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=os.path.expanduser, help="the base: a directory, or a name on the hub")
    add(
        "--data",
        type=os.path.expanduser,
        help="rows: .json, .jsonl, .csv, .tsv or .parquet, or a hub name",
    )
    add("--card", help="memory of the card, such as 8GB, or cpu; default: this machine's")
    add("--purpose", help=f"{', '.join(PURPOSES)} (default: answers)")
    add("--output", default="run.yaml", help="the file to write (default: run.yaml)")
    add("--output_dir", help="of the run (default: runs/MODEL-ROWS)")
    add("--yes", action="store_true", help="ask nothing: take the defaults")
    parser.set_defaults(run=_init)


def _asker(yes: bool) -> Ask:
    """Questions on a terminal; without one, or with --yes, an answer is the default or an error."""
    asks = not yes and sys.stdin.isatty() and sys.stdout.isatty()

    def ask(what: str, flag: str, default: str | None) -> str:
        if not asks:
            if default is not None:
                return default
            raise UserError(f"leanlift init needs {flag}: give it, or answer on a terminal.")
        while True:
            try:
                said = input(f"{what}{f' [{default}]' if default else ''}: ").strip()
            except EOFError:
                raise UserError(f"leanlift init needs {flag}, and the input has ended.") from None
            if said or default:
                return os.path.expanduser(said or default or "")

    return ask


def _choices() -> str:
    lines = [f"  {name}: to {what}" for name, what in PURPOSES.items()]
    return "\n".join(["What for?", *lines, "Purpose"])


def _check_purpose(purpose: str) -> None:
    if purpose not in PURPOSES:
        raise UserError(f"expected a purpose among {', '.join(PURPOSES)}, got {purpose!r}.")


def _gib(card: str) -> float | None:
    """GiB of a card; None for the CPU."""
    if card.strip().lower() == CPU:
        return None
    return parse_card(card)


def _this_card() -> str | None:
    """The memory of this machine's card; None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    return f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.1f}GB"
