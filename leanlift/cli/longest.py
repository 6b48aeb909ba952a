"""`leanlift plan --max_length max`: the longest rows that cards have room for, as a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from leanlift.cli.trying import planning
from leanlift.format import short_name, table
from leanlift.measure.picture import draw_groups
from leanlift.plan.result import CARDS_GIB
from leanlift.training import LiftSFTConfig, RunArguments
from leanlift.training.changes import Change
from leanlift.training.longest import MOST, Longest, longest_rows

AS_ASKED = "as asked for"


def longest(
    args: RunArguments, sft: LiftSFTConfig, gib: float | None, cuda: bool, as_json: bool
) -> list[Longest]:
    """Look for them, and print what came out.

    Args:
        args, sft: the settings.
        gib: of the card; None: the usual sizes.
        cuda: whether the run is on one.
        as_json: whether JSON is printed.

    Raises:
        UserError: a model that cannot be planned for.
    """
    cards = CARDS_GIB[:-1] if gib is None else (gib,)
    with planning(args.model_name_or_path) as trying:
        found = longest_rows(args, sft, cards, cuda, trying)
    if as_json:
        print(json.dumps([_as_json(line) for line in found], indent=2))
    else:
        print(screen(short_name(args.model_name_or_path), found, sft.per_device_train_batch_size))
    return found


def _as_json(line: Longest) -> dict[str, Any]:
    tokens = {f"{gib:g}": count for gib, count in line.tokens.items()}
    return {"changed": line.keys, "max_length": tokens}


def screen(model: str, lines: Sequence[Longest], rows: int) -> str:
    """The table: a line for each setting, a column for each card."""
    cards = list(lines[0].tokens)
    cells = [[name_of(line.added), *(_shown(line.tokens[gib]) for gib in cards)] for line in lines]
    head = ["each line with those above", *(f"{gib:g} GB" for gib in cards)]
    at_once = f"{rows} row{'s' * (rows != 1)} at a time"
    return "\n".join(
        [
            f"{model}: the longest rows that a card has room for, in tokens, {at_once}.",
            "",
            *table(cells, head),
            "",
            "What a model has positions for, and does well with, is another matter.",
        ]
    )


def name_of(added: Change | None) -> str:
    """Of a line: its first setting that is changed."""
    return AS_ASKED if added is None else f"+ {added.named.partition(' and ')[0]}"


def _shown(tokens: int) -> str:
    return "–" if not tokens else f"{tokens:,}" + ("+" if tokens == MOST else "")


def picture(path: str, model: str, lines: Sequence[Longest]) -> None:
    """Draw them: a group of bars for each card."""
    bars = {name_of(line.added): {f"{g:g} GB": n for g, n in line.tokens.items()} for line in lines}
    draw_groups(bars, path, f"{model}: the longest rows by card, in tokens", "tokens", ",")
