"""The longest rows that cards have room for, as `leanlift plan --max_length max` finds them.

    python -m benchmarks.longest [--models Llama-3-8B ...]

Nothing is downloaded (`benchmarks.plan` has the shapes). One row a step, as many trained entries as
a LoRA of r = 64 on every Linear has, NF4 with double quantization. A line of the results has one
setting more than the line before it.
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
from benchmarks.plan import MODELS
from leanlift.cli.settings import read_command
from leanlift.training.longest import longest_rows

CARDS = (4.0, 6.0, 8.0, 12.0, 16.0, 24.0)
DEFAULT = ("Llama-3-8B",)


def rows_of(name: str, directory: Path) -> list[dict[str, Any]]:
    """A row per setting."""
    path = directory / name / "config.json"
    path.parent.mkdir()
    facts = {**MODELS[name].to_dict(), "max_position_embeddings": 2**20}
    path.write_text(json.dumps(facts), encoding="utf-8")
    told = ["--model_name_or_path", str(path.parent), "--rank_budget", "64"]
    asked = read_command("plan", [*told, "--per_device_train_batch_size", "1"])
    started, made = time.process_time(), []
    for line in longest_rows(asked.args, asked.sft, CARDS):
        added = "as it is" if line.added is None else line.added.named
        tokens = {f"{card:g} GB": tokens for card, tokens in line.tokens.items()}
        made.append({"model": name, "added": added, **tokens})
        print(made[-1], flush=True)
    seconds = round(time.process_time() - started, 1)
    return [{**row, "CPU s of all lines": seconds} for row in made]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(DEFAULT))
    arguments = parser.parse_args()
    logging.getLogger("leanlift").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as directory:
        rows = [row for name in arguments.models for row in rows_of(name, Path(directory))]
    if tuple(arguments.models) == DEFAULT:
        print(f"Wrote {write_rows('longest', rows)}")


if __name__ == "__main__":
    main()
