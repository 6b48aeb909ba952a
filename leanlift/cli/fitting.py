"""Which settings would fit known models on a card: the table at the end of `leanlift doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from leanlift.cli.looks import Look
from leanlift.cli.settings import read_command
from leanlift.cli.trying import planning
from leanlift.demo.known import KNOWN
from leanlift.format import size
from leanlift.training.by_card import Setting, with_changes

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


def ladder(name: str, place: Path, least: float) -> list[Setting]:
    """The settings that are tried, one change more each; the last one fits `least` GiB, where any
    does."""
    asked = read_command("plan", ["--model_name_or_path", str(place), "--max_length", str(TOKENS)])
    steps: list[Setting] = []
    with planning(name) as trying:
        for setting in with_changes(asked.args, asked.sft, lambda line: trying(f"{name}: {line}")):
            steps.append(setting)
            if setting.plan.fits(least):
                break
    return steps


def first_that_fits(steps: list[Setting], gib: float) -> tuple[str, dict[str, Any]]:
    """The first settings that fit a card, in words and as facts."""
    for step in steps:
        if step.plan.fits(gib):
            words = f"with {', '.join(step.keys)}" if step.keys else "with the command's defaults"
            needed = step.plan.needed
            return f"{size(needed)} {words}", {"changed": step.keys, "needed": needed}
    least = steps[-1].plan.needed
    return f"no: {size(least)} at least", {"changed": None, "needed": least}
