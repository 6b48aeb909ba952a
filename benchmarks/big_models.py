"""What fine-tuning mixtures, hybrids and other models of this year needs, and which cards hold it.

    python -m benchmarks.big_models [--models Qwen3-30B-A3B ...]

Nothing is downloaded: `big_models.json` has what decides memory of each model's public config.json,
under the name of its repository, and how many billions of weights it is published with, with which
the plan's own count is compared. Planned is what `leanlift plan` plans when it is told the model
and rows of 2,048 tokens (NF4 with double quantization, experts too, 5 %, 8-bit moments, a GPU), and
for each card below that what `--fit` makes of it. `benchmarks/models_page.py` shows the results.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import write_rows
from leanlift import MemoryPlan, UserError
from leanlift.cli.settings import read_command
from leanlift.training import plan_of
from leanlift.training.fit import fit

MODELS: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text())
CARDS = (8, 12, 16, 24, 48, 80)
TOKENS = 2048
GIB = 2**30
DOES_NOT_FIT = "no"


def planned(name: str, place: Path) -> tuple[Any, MemoryPlan]:
    """What the command is told of a model, and its plan.

    Raises:
        ValueError: the plan is of another number of weights than is published.
    """
    facts = MODELS[name]
    (place / "config.json").write_text(json.dumps(facts["config"]))
    asked = read_command("plan", ["--model_name_or_path", str(place), "--max_length", str(TOKENS)])
    plan = plan_of(asked.args, asked.sft, cuda=True)
    off = plan.weights / 1e9 / facts["billions"] - 1
    if abs(off) > 0.02:
        raise ValueError(f"{name} has {plan.weights:,} weights, {off:+.1%} off what is published")
    return asked, plan


def row(name: str, place: Path) -> dict[str, Any]:
    """The plan of a model, and for each card whether it holds it, or what has to change."""
    started = time.process_time()
    asked, plan = planned(name, place)
    seconds = time.process_time() - started
    found = {
        "model": name,
        "source": MODELS[name]["source"],
        "weights, 1e9": round(plan.weights / 1e9, 2),
        "trained, 1e9": round(plan.entries / 1e9, 3),
        "base GiB": round(plan.categories["base weights"] / GIB, 2),
        "load GiB": round(plan.phases["load"] / GIB, 2),
        "needed GiB": round(plan.needed / GIB, 2),
        "seconds": round(seconds, 1),
    }
    for card in CARDS:
        found[f"{card} GB"] = (
            "as it is" if plan.fits(card) else _fitted(asked.args, asked.sft, card)
        )
    return found


def _fitted(args: Any, sft: Any, card: int) -> str:
    """What `--fit` changes, as keys of a settings file; or that nothing is enough."""
    try:
        taken = fit(args, sft, card, cuda=True).taken
    except UserError:
        return DOES_NOT_FIT
    changed = {key: value for step in taken for key, value in step.change.keys.items()}
    return ", ".join(f"{key}={str(value).lower()}" for key, value in changed.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    rows = []
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as place:
            rows.append(row(name, Path(place)))
        print(rows[-1], flush=True)
    if len(rows) == len(MODELS):
        print(f"Wrote {write_rows('big_models', rows)}")


if __name__ == "__main__":
    main()
