"""`leanlift plan --model_name_or_path M [--any_key value] [--fit 8GB [--save run.yaml]] [--json]`.

With `--max_length max` the longest rows that cards have room for (`cli/longest.py`), with `--table`
what settings need and take by card (`cli/by_card.py`).

Takes every key that `leanlift train` takes, with the same defaults, which are leaner than those of
the Python classes (8-bit moments, bf16 offsets, one row at a time, eight to a step: see
`command_defaults`); keys without a bearing on memory change nothing. A run on a GPU is planned,
whatever this machine has, unless `--cpu` is given.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from leanlift.cli.by_card import SIZES, settings_by_card
from leanlift.cli.by_card import picture as draw_times
from leanlift.cli.longest import longest
from leanlift.cli.longest import picture as draw_lengths
from leanlift.cli.places import new_settings_file
from leanlift.cli.settings import Asked, read_command
from leanlift.cli.trying import Trying, planning
from leanlift.defaults import command_defaults
from leanlift.errors import UserError
from leanlift.format import short_name, size
from leanlift.measure.picture import check_picture, draw
from leanlift.plan import MemoryPlan, format_plan
from leanlift.plan.calibrate import detected
from leanlift.plan.cards import Card, card_named, card_of_size
from leanlift.plan.time import step_time
from leanlift.training import LiftSFTConfig, RunArguments, plan_of
from leanlift.training.changes import Taken
from leanlift.training.checks import check_settings
from leanlift.training.faster import Bought
from leanlift.training.fit import Fit, fit, parse_card, useful_changes
from leanlift.training.propose import reasons_of
from leanlift.training.recipe import Section, write_recipe

SMALL = 4 * 2**30
"""What needs no more fits any card, and no change is worth its price."""


def plan_command(argv: Sequence[str]) -> int:
    """Plan, and print what came out."""
    asked = read_command("plan", argv)
    own, args, sft = asked.own, asked.args, asked.sft
    gib = None if own.fit is None else parse_card(own.fit)
    if own.plot is not None:
        check_picture(own.plot)
    if own.save is not None:
        new_settings_file(own.save)
    check_settings(sft, args.lift_config())
    if own.cpu and asked.given.setdefault("use_cpu", True) is False:
        raise UserError("--cpu and use_cpu=false contradict each other: leave one of them out.")
    cuda = not asked.given.get("use_cpu")
    card = card_for_times(gib, cuda, own.card)
    if own.longest or own.table:
        _tables(asked, gib, cuda)
        return 0
    found, plan = _planned(args, sft, gib, cuda, card, asked.given)
    taken, bought = ((), ()) if found is None else (found.taken, found.bought)
    if found is not None:
        args, sft = found.args, found.sft
    if own.json:
        changes = {
            "changed": [_as_json(t) for t in taken],
            "bought": [_bought_as_json(b) for b in bought],
        }
        print(json.dumps({**plan.to_dict(), **changes}, indent=2))
    else:
        print(format_plan(plan.to_dict()), flush=True)
    if gib is not None and not own.json:
        print("\n".join(["", *fitted(taken, plan, gib, bought)]))
    elif not own.json and plan.needed > SMALL:
        with Trying() as trying:
            useful = useful_changes(args, sft, plan, cuda, say=trying)
        print("\n".join(["", *advice(useful)]) if useful else "")
    if own.plot is not None:
        title = f"{short_name(plan.model)}: planned memory of a training step, {size(plan.peak)}"
        draw({"planned": plan.categories}, own.plot, title, plan.context)
        _say(f"Wrote {own.plot}")
    if own.save is not None:
        _save(own.save, asked.given, args, sft, plan, found)
    return 0


def _tables(asked: Asked, gib: float | None, cuda: bool) -> None:
    """What cards have room for, and how long a step takes there, instead of one plan."""
    own, args, sft = asked.own, asked.args, asked.sft
    model = short_name(args.model_name_or_path)
    if own.longest:
        lengths = longest(args, sft, gib, cuda, own.json)
        if own.plot is not None:
            draw_lengths(own.plot, model, lengths)
    else:
        cards = _cards(gib, cuda, own.card)
        table = settings_by_card(args, sft, cards, asked.given, own.json)
        if own.plot is not None:
            draw_times(own.plot, model, table)
    if own.plot is not None:
        _say(f"Wrote {own.plot}")


def _cards(gib: float | None, cuda: bool, name: str | None) -> dict[float, Card]:
    """The columns of a table: the size or the card that was asked for, else the usual sizes."""
    if not cuda:
        raise UserError("--table is about cards: leave --cpu and use_cpu out.")
    if name is not None:
        card = card_named(name)
        return {float(card.gib) if gib is None else gib: card}
    found = {size: card_for_times(size, cuda) for size in (SIZES if gib is None else (gib,))}
    return {size: card for size, card in found.items() if card is not None}


def card_for_times(gib: float | None, cuda: bool, name: str | None = None) -> Card | None:
    """The card whose step times are modelled: the one that was named; else this machine's, its
    figures measured; else one that stands for the size asked for. None: there is none of these.

    Args:
        gib: the size that was asked for.
        cuda: whether the run is on a card.
        name: that was asked for.

    Raises:
        UserError: no such card is known.
    """
    if name is not None:
        return card_named(name) if cuda else None
    here = detected() if cuda else None
    if here is not None and (gib is None or abs(here.gib - gib) <= 1):
        return here
    return card_of_size(gib) if cuda and gib is not None else None


def _planned(
    args: RunArguments,
    sft: LiftSFTConfig,
    gib: float | None,
    cuda: bool,
    card: Card | None,
    asked: Collection[str],
) -> tuple[Fit | None, MemoryPlan]:
    """What was changed to fit a card, if one is given, and the plan.

    Raises:
        UserError: nothing fits, or the model cannot be planned for.
    """
    with planning(args.model_name_or_path) as trying:
        found = None
        if gib is not None:
            found = fit(args, sft, gib, cuda, trying, card=card, asked=asked)
        return found, timed(plan_of(args, sft, cuda) if found is None else found.plan, card)


def timed(plan: MemoryPlan, card: Card | None) -> MemoryPlan:
    """The plan with the time of a step on a card, where there is one."""
    if card is None or plan.work is None:
        return plan
    return replace(plan, time=step_time(plan.work, card).to_dict())


def advice(useful: Sequence[Taken]) -> list[str]:
    """The changes that save most, each with what it costs."""
    lines = ["What would save most, each on its own:"]
    for number, taken in enumerate(useful, 1):
        lines += [
            f"{number}. {taken.change.named}",
            f"   saves {size(taken.saved)}: {_cost(taken)}",
        ]
    return lines


def fitted(
    taken: Sequence[Taken], plan: MemoryPlan, gib: float, bought: Sequence[Bought] = ()
) -> list[str]:
    """What was changed for a card, and why that is enough; and what is faster for what is left."""
    free = size(gib * 2**30 - plan.needed)
    lines = [f"Changed to fit {gib:g} GB, with {free} to spare:"]
    if not taken:
        lines = [f"It fits {gib:g} GB as it is, with {free} to spare."]
    for number, step in enumerate(taken, 1):
        lines += [f"{number}. {step.change.named}", f"   saves {size(step.saved)}: {_cost(step)}"]
    if bought:
        lines += ["Of what was left, time was bought back:"]
    for number, each in enumerate(bought, 1):
        lines += [f"{number}. {each.change.named}"]
        lines += textwrap.wrap(each.why, 76, initial_indent="   ", subsequent_indent="   ")
    return lines


def _cost(taken: Taken) -> str:
    return taken.change.cost


def _as_json(taken: Taken) -> dict[str, Any]:
    return {"keys": taken.change.keys, "cost": taken.change.cost, "saved": taken.saved}


def _bought_as_json(bought: Bought) -> dict[str, Any]:
    return {
        "keys": bought.change.keys,
        "takes": bought.taken,
        "seconds": [bought.slower.seconds, bought.faster.seconds],
    }


def _save(
    place: str,
    given: dict[str, Any],
    args: RunArguments,
    sft: LiftSFTConfig,
    plan: MemoryPlan,
    found: Fit | None,
) -> None:
    """Write the settings that were given, the command's defaults and what was changed."""
    taken = () if found is None else found.taken
    bought = () if found is None else found.bought
    steps = [*(step.change for step in taken), *(each.change for each in bought)]
    changed = {key: value for change in steps for key, value in change.keys.items()}
    why = reasons_of(taken, bought)
    kept = {key: value for key, value in given.items() if key not in changed}
    if not {"dataset_name", "datasets"} & set(kept):
        kept["dataset_name"] = args.dataset_name
        why["dataset_name"] = "your rows: .json, .jsonl, .csv, .parquet"
    defaults = {k: v for k, v in command_defaults(given).items() if k not in changed}
    held = f"Planned to need {size(plan.needed)}"
    rows, tokens = (plan.holds_for[key] for key in ("per_device_train_batch_size", "max_length"))
    head = [
        f"{held} of a card: {short_name(plan.model)}, {rows} × {tokens:,} tokens at a time.",
        f"    leanlift train --config {place} --dry_run",
    ]
    write_recipe(
        place,
        head,
        [
            Section("What was asked for", kept, why),
            Section("Defaults of the command", defaults, {}),
            Section("Chosen to fit", changed, why),
        ],
    )
    _say(f"Wrote {place}: leanlift train --config {place}")


def _say(line: str) -> None:
    print(line, file=sys.stderr)
