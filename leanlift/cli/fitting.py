"""Which settings would fit known models on a card: the table at the end of `leanlift doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from leanlift.cli.looks import Look
from leanlift.cli.settings import read_command
from leanlift.cli.trying import planning
from leanlift.demo.known import KNOWN
from leanlift.format import size
from leanlift.plan import Known, MemoryPlan
from leanlift.training.changes import Change, further_changes
from leanlift.training.fit import LEAST_GAIN
from leanlift.training.plan import plan_of

TOKENS = 2048


def fitting(sizes: list[float], models: dict[str, Path] | None = None) -> Look:
    """Plan each model as the command has it, then with one change more at a time, until the
    smallest of the cards has room.

    Args:
        sizes: GiB of the cards, rising.
        models: by name, directories with a config.json; default: five known ones.
    """
    found = Look()
    steps = {
        name: ladder(name, place, sizes[0])
        for name, place in (KNOWN if models is None else models).items()
    }
    for gib in sizes:
        facts = found.facts[f"{gib:g}"] = {}
        found.lines.append(("", f"on {gib:.3g} GB, at 1 row × {TOKENS:,} tokens, 5 % trained:"))
        for name, tried in steps.items():
            text, facts[name] = first_that_fits(tried, gib)
            found.lines.append((name, text))
    found.lines.append(("", "leanlift plan --fit says what such settings cost."))
    return found


def ladder(name: str, place: Path, least: float) -> list[tuple[list[Change], MemoryPlan]]:
    """The settings that are tried: each with the changes that make it, and its plan. The last one
    fits `least` GiB, where any does."""
    known: Known = {}
    argv = ["--model_name_or_path", str(place), "--max_length", str(TOKENS)]
    asked = read_command("plan", argv)
    settings = (asked.args, asked.sft)
    with planning(name) as trying:
        trying(f"planning {name}")
        steps: list[tuple[list[Change], MemoryPlan]] = [([], plan_of(*settings, True, None, known))]
        for change in further_changes(*settings):
            if steps[-1][1].fits(least):
                break
            if not change.possible(settings):
                continue
            trying(f"planning {name}: {change.named}")
            plan, (made, before) = plan_of(*change(settings), True, None, known), steps[-1]
            if before.needed - plan.needed >= LEAST_GAIN * before.needed:
                settings = change(settings)
                steps.append(([*made, change], plan))
    return steps


def first_that_fits(
    steps: list[tuple[list[Change], MemoryPlan]], gib: float
) -> tuple[str, dict[str, Any]]:
    """The first settings that fit a card, in words and as facts."""
    for changes, plan in steps:
        if plan.fits(gib):
            keys = {key: value for change in changes for key, value in change.keys.items()}
            words = f"with {', '.join(keys)}" if keys else "with the command's defaults"
            return f"{size(plan.needed)} {words}", {"changed": keys, "needed": plan.needed}
    least = steps[-1][1].needed
    return f"no: {size(least)} at least", {"changed": None, "needed": least}
