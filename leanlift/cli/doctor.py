"""`leanlift doctor`: what is installed, what this machine has, what runs on it, and what would fit.

Each look is made by itself (`leanlift.cli.looks`); one that fails is told, and the others go on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from leanlift.errors import UserError, first_line
from leanlift.format import parse_card

EXIT_PROBLEMS = 1


def add_doctor(commands: Any) -> None:
    """The parser of the command."""
    parser = commands.add_parser(
        "doctor",
        help="what is installed, which card there is, what runs on it, and what would fit",
        description="Look at versions, this machine, its cards, the kernels and the hub's cache, "
        "without a network, and say what to do about each problem. For a card also which settings "
        "would fit five known models; their plans take a minute once and are kept. The exit code "
        "is 0 where all is well, else 1.",
    )
    parser.add_argument(
        "--card",
        metavar="NAME|12GB",
        help="plan for a card of this name or size; default: those of this machine",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    asked = None if options.card is None else size_of(options.card)
    from leanlift.cli import looks as look_at

    looks = []
    for name, look in {
        "installed": look_at.software,
        "machine": look_at.machine,
        "cards": look_at.cards,
        "kernels": kernels,
        "hub": look_at.hub,
    }.items():
        looks.append(made(name, look))
        if not options.json:
            print("\n".join(shown(looks[-1])), flush=True)
    sizes = [asked] if asked is not None else look_at.card_sizes()
    if sizes:
        looks.append(made("what fits", lambda: fitting(sizes)))
        if not options.json:
            print("\n".join(shown(looks[-1])), flush=True)
    problems = [problem for look in looks for problem in look.problems]
    if options.json:
        facts = {look.name: look.facts for look in looks}
        print(json.dumps({"looks": facts, "problems": problems}, indent=2))
    else:
        print("\n".join(ending(problems)))
    return EXIT_PROBLEMS if problems else 0


def kernels() -> Any:
    """A look for which torch has to be there."""
    from leanlift.cli import looks_kernels

    return looks_kernels.kernels()


def fitting(sizes: list[float]) -> Any:
    """A look for which everything has to be there."""
    from leanlift.cli import fitting as planned

    return planned.fitting(sizes)


def size_of(text: str) -> float:
    """GiB of a card that was named, or of a size.

    Raises:
        UserError: neither.
    """
    try:
        return parse_card(text)
    except UserError:
        from leanlift.plan.cards import card_named

        return float(card_named(text).gib)


def made(name: str, look: Callable[[], Any]) -> Any:
    """A look; where it fails, that it did, which is a problem too."""
    from leanlift.cli.looks import Look

    try:
        found = look()
    except Exception as error:  # whatever a broken installation does
        said = f"{type(error).__name__}: {first_line(error)}"
        problem = (
            f"{name} could not be looked at ({said.rstrip('.')}): install what it names anew, or "
            "report it."
        )
        return Look(name, {"failed": said}, [("failed", said)], [problem])
    found.name = name
    return found


def shown(look: Any) -> list[str]:
    """A look as text."""
    from leanlift.report.text import labelled

    lines = [look.name]
    for label, text in look.lines:
        lines += (
            [f"  {line}" for line in labelled(label, text)] if label else [f"  {text}".rstrip()]
        )
    return [*lines, ""]


def ending(problems: list[str]) -> list[str]:
    """What to do, a line for each problem."""
    from leanlift.report.text import wrapped

    if not problems:
        return ["All is well."]
    lines = ["What to do:"]
    for number, problem in enumerate(problems, 1):
        lines += wrapped(f"{number}. {problem}")
    return lines
