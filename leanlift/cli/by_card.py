"""`leanlift plan --table`: what settings need and how long a step takes, by card."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Collection
from typing import Any

from leanlift.cli.longest import name_of
from leanlift.cli.trying import planning
from leanlift.format import gib as in_gib
from leanlift.format import short_name, table
from leanlift.measure.picture import draw_groups
from leanlift.plan.cards import Card
from leanlift.plan.screen import WIDTH, brief
from leanlift.plan.time import StepTime
from leanlift.training import LiftSFTConfig, RunArguments
from leanlift.training.by_card import ByCard, by_card
from leanlift.training.fit import Fit

SIZES = (6, 8, 12, 16, 24)
"""In GiB, unless one is asked for."""

FITTED = "chosen by --fit"


def settings_by_card(
    args: RunArguments,
    sft: LiftSFTConfig,
    cards: dict[float, Card],
    asked: Collection[str],
    as_json: bool,
) -> ByCard:
    """Make the table, and print it.

    Args:
        args, sft: the settings.
        cards: by size in GiB.
        asked: keys that the user has set.
        as_json: whether JSON is printed.

    Raises:
        UserError: a model that cannot be planned for.
    """
    with planning(args.model_name_or_path) as trying:
        found = by_card(args, sft, cards, trying, asked)
    if as_json:
        print(json.dumps(_as_json(found), indent=2))
    else:
        print(screen(args.model_name_or_path, found))
    return found


def screen(model: str, found: ByCard) -> str:
    """A line for each setting, a column for each card."""
    cells = []
    for line in found.settings:
        times = [_shown(line.time(card, gib)) for gib, card in found.cards.items()]
        cells.append([name_of(line.added), in_gib(line.plan.needed), *times])
    cells.append([FITTED, "", *(_shown(found.fitted_time(gib)) for gib in found.cards)])
    head = ["each line with those above", "GiB", *(f"{gib:g} GB" for gib in found.cards)]
    held = found.settings[0].plan.holds_for
    rows, tokens, times = (
        held[key]
        for key in ("per_device_train_batch_size", "max_length", "gradient_accumulation_steps")
    )
    step = f"{rows} row{'s' * (rows != 1)} × {tokens:,} tokens" + f", {times} times" * (times > 1)
    why = (
        f"The time of a step is modelled, for {_named(found.cards)}; –: it does not fit. "
        f"{FITTED.capitalize()}: settings for each card that also use up what is left of it; "
        "leanlift plan --fit 8GB says which."
    )
    return "\n".join(
        [
            *textwrap.wrap(f"{short_name(model)}: what a step of {step} needs and takes.", WIDTH),
            "",
            *table(cells, head),
            "",
            *textwrap.wrap(why, WIDTH),
        ]
    )


def picture(path: str, model: str, found: ByCard) -> None:
    """Draw seconds: a group of bars for each card."""
    names = {gib: f"{card.name}, {gib:g} GB" for gib, card in found.cards.items()}
    bars = {
        name_of(line.added): {
            names[gib]: _seconds(line.time(card, gib)) for gib, card in found.cards.items()
        }
        for line in found.settings
    }
    bars[FITTED] = {names[gib]: _seconds(found.fitted_time(gib)) for gib in found.cards}
    title = f"{short_name(model)}: seconds of a step by card, modelled"
    draw_groups(bars, path, title, "seconds", ".2f")


def _named(cards: dict[float, Card]) -> str:
    sizes: dict[str, list[str]] = {}
    for gib, card in cards.items():
        sizes.setdefault(card.name, []).append(f"{gib:g}")
    return ", ".join(f"{name} ({', '.join(each)} GB)" for name, each in sizes.items())


def _shown(time: StepTime | None) -> str:
    return "–" if time is None else brief(time.seconds)


def _seconds(time: StepTime | None) -> float:
    return 0.0 if time is None else time.seconds


def _as_json(found: ByCard) -> dict[str, Any]:
    def times(of: dict[float, StepTime | None]) -> dict[str, float | None]:
        return {f"{gib:g}": None if time is None else time.seconds for gib, time in of.items()}

    return {
        "cards": {f"{gib:g}": card.name for gib, card in found.cards.items()},
        "settings": [
            {
                "changed": line.keys,
                "needed": line.plan.needed,
                "seconds": times({gib: line.time(c, gib) for gib, c in found.cards.items()}),
            }
            for line in found.settings
        ],
        "fitted": {f"{gib:g}": _fitted(fit, found, gib) for gib, fit in found.fitted.items()},
    }


def _fitted(fit: Fit | None, found: ByCard, gib: float) -> dict[str, Any] | None:
    if fit is None:
        return None
    steps = [*(step.change for step in fit.taken), *(each.change for each in fit.bought)]
    changed = {key: value for change in steps for key, value in change.keys.items()}
    time = found.fitted_time(gib)
    assert time is not None
    return {"changed": changed, "needed": fit.plan.needed, "seconds": time.seconds}
