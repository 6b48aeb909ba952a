"""What `leanlift plan --fit` chooses for usual models on cards of 6 to 24 GB: a table, and recipes.

    python -m benchmarks.recipes [--models Qwen2.5-7B ...]

Nothing is downloaded: `benchmarks.plan` has the shapes of most of these models, the others are
here. Asked for are rows of 2,048 tokens and 5 % of every matrix (of the 70B model's 1 %); what it
takes to fit each card is changed, and what is left buys time back. Seconds of a step of eight rows
are modelled, for the slowest consumer card of the size. Written are `results/recipes.csv`, of which
`benchmarks.pages` makes a table, and for some pairs (`RECIPES`) a file of settings in `examples/`.
Rows of models that are not named stay as they are.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Qwen2Config

from benchmarks.common import RESULTS, read_rows, write_rows
from benchmarks.plan import DENSITIES, MODELS, shape
from leanlift import UserError
from leanlift.cli.settings import Asked, read_command
from leanlift.defaults import command_defaults
from leanlift.format import size
from leanlift.plan.cards import Card, card_of_size
from leanlift.plan.time import step_time
from leanlift.training.fit import Fit, fit
from leanlift.training.propose import reasons_of
from leanlift.training.recipe import Section, recipe

ROOT = Path(__file__).parent.parent
CARDS = (6, 8, 12, 16, 24)
LARGE = ("Qwen2.5-32B", "Llama-3-70B")
"""Models that are planned for the last card alone."""

GIB = 2**30

SHAPES = MODELS | {
    "Qwen2.5-32B": Qwen2Config(**shape(152064, 5120, 27648, 64, 40, 8)),
}
NAMES = {
    "Phi-3-mini": "microsoft/Phi-3-mini-4k-instruct",
    "Llama-2-7B": "meta-llama/Llama-2-7b-hf",
    "Mistral-7B": "mistralai/Mistral-7B-v0.1",
    "Qwen2.5-7B": "Qwen/Qwen2.5-7B",
    "Llama-3-8B": "meta-llama/Meta-Llama-3-8B",
    "Qwen3-8B": "Qwen/Qwen3-8B",
    "Gemma-2-9B": "google/gemma-2-9b",
    "Llama-2-13B": "meta-llama/Llama-2-13b-hf",
    "Qwen2.5-32B": "Qwen/Qwen2.5-32B",
    "Llama-3-70B": "meta-llama/Meta-Llama-3-70B",
}
"""Models by the name of their shape, and where they are on the hub."""

RECIPES = (
    ("Phi-3-mini", 6),
    ("Mistral-7B", 6),
    ("Llama-3-8B", 6),
    ("Mistral-7B", 8),
    ("Qwen2.5-7B", 8),
    ("Llama-3-8B", 8),
    ("Qwen3-8B", 12),
    ("Gemma-2-9B", 12),
    ("Llama-2-13B", 16),
    ("Qwen2.5-32B", 24),
    ("Llama-3-70B", 24),
)
"""Pairs that have a file of settings."""


def place_of(model: str, card: int) -> Path:
    """The file of settings of a pair, from the repository's root."""
    return Path("examples") / f"{card}gb" / f"{model.lower()}.yaml"


@contextmanager
def checkpoints(directory: Path) -> Iterator[None]:
    """A working directory in which each model's name is a directory with its config.json, so that
    settings name it as on the hub."""
    before = Path.cwd()
    for model, name in NAMES.items():
        place = directory / name / "config.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(SHAPES[model].to_dict()), encoding="utf-8")
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


def asked_of(model: str) -> Asked:
    """What every pair is asked for."""
    told = {
        "model_name_or_path": NAMES[model],
        "dataset_name": "rows.jsonl",
        "output_dir": f"runs/{model.lower()}",
        "density": DENSITIES.get(model, 0.05),
        "max_length": 2048,
        "num_train_epochs": 3,
        "learning_rate": 2e-4,
        "save_steps": 200,
        "save_total_limit": 2,
    }
    return read_command("plan", [word for key, value in told.items()
                                 for word in (f"--{key}", str(value))])  # fmt: skip


def changed(found: Fit) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that were changed to fit, and after that for time."""
    fitted = {key: value for step in found.taken for key, value in step.change.keys.items()}
    return fitted, {k: v for each in found.bought for k, v in each.change.keys.items()}


def row(model: str, card: int, found: Fit | None, stands_for: Card) -> dict[str, Any]:
    """A line of the results; of what does not fit, without figures."""
    facts: dict[str, Any] = {"model": model, "card GB": card, "fits": found is not None}
    blank = dict.fromkeys(("needed GiB", "host GiB", "to fit", "for time", "seconds a step"), "")
    if found is None:
        return {**facts, **blank, "modelled for": ""}
    assert found.plan.work is not None
    fitted, bought = changed(found)
    return {
        **facts,
        "needed GiB": round(found.plan.needed / GIB, 2),
        "host GiB": round(found.plan.host / GIB, 2),
        "to fit": _words(fitted),
        "for time": _words(bought),
        "seconds a step": round(step_time(found.plan.work, stands_for).seconds, 1),
        "modelled for": stands_for.name,
    }


def _words(keys: dict[str, Any]) -> str:
    return ", ".join(f"{key}={str(value).lower()}" for key, value in keys.items())


def settings_file(model: str, card: int, asked: Asked, found: Fit) -> str:
    """The text of a recipe."""
    fitted, bought = changed(found)
    new, why = {**fitted, **bought}, reasons_of(found.taken, found.bought)
    why["dataset_name"] = "your rows: docs/rows.md says which"
    why["density"] = f"{100 * asked.args.density:g} % of each matrix is trained"
    place = place_of(model, card)
    held = f"{found.plan.holds_for['per_device_train_batch_size']} × 2,048 tokens at a time"
    host = f", and {size(found.plan.host)} of the host's memory" if found.plan.host else ""
    head = [
        f"{model} on a card with {card} GB: planned to need {size(found.plan.needed)}{host}, "
        f"{held}.",
        f"    leanlift train --config {place} --dataset_name rows.jsonl --dry_run",
        f"    leanlift train --config {place} --dataset_name rows.jsonl",
        "Chosen by leanlift plan --fit and written by benchmarks/recipes.py; a test plans it anew.",
    ]
    defaults = command_defaults(asked.given)
    given = {key: _plain(value) for key, value in asked.given.items() if key not in new}
    sections = [
        Section("What was asked for", given, why),
        Section("Defaults of the command", {k: v for k, v in defaults.items() if k not in new}, {}),
        Section(f"Chosen to fit {card} GB", new, why),
    ]
    return recipe(head, sections)


def _plain(value: Any) -> Any:
    """A whole number as one: 3, not 3.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def cards_of(model: str) -> tuple[int, ...]:
    """The cards that a model is planned for."""
    return CARDS[-1:] if model in LARGE else CARDS


def rows_of(model: str) -> list[dict[str, Any]]:
    """A row for each card; recipes are written on the way."""
    asked, rows = asked_of(model), []
    for card in cards_of(model):
        started, stands_for = time.process_time(), card_of_size(card)
        try:
            found = fit(asked.args, asked.sft, card, card=stands_for, asked=asked.given)
        except UserError:
            found = None
        made = row(model, card, found, stands_for)
        rows.append({**made, "CPU s": round(time.process_time() - started, 1)})
        print(rows[-1], flush=True)
        if found is not None and (model, card) in RECIPES:
            place = ROOT / place_of(model, card)
            place.parent.mkdir(exist_ok=True)
            place.write_text(settings_file(model, card, asked, found), encoding="utf-8")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=NAMES, default=list(NAMES))
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as directory, checkpoints(Path(directory)):
        for model in arguments.models:
            rows = rows_of(model)
            before = read_rows(RESULTS / "recipes.csv")
            kept = [row for row in before if row["model"] != model]
            print(f"Wrote {write_rows('recipes', rows, kept)}: python -m benchmarks.pages")


if __name__ == "__main__":
    main()
