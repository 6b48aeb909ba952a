"""How long a plan takes, and `--fit`: CPU seconds beyond the imports, as the commands ask.

    LEANLIFT_PLANS=off python -m benchmarks.plan_seconds

One process for each figure, so that none profits from another; the first plan of a tiny model comes
before it, with which everything has been imported. Nothing is downloaded (`benchmarks.plan` has the
shapes). The bars are 5 s for a plan of an 8B model and 15 s for its `--fit`.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import write_rows
from benchmarks.plan import MODELS
from leanlift.cli.settings import read_command
from leanlift.demo.run import BASE
from leanlift.plan import MemoryPlan
from leanlift.training import plan_of
from leanlift.training.fit import fit

NAMED = ("Llama-3-8B", "Qwen3-8B", "Gemma-2-9B", "Llama-3-70B")
CARDS = (None, 6.0, 8.0, 12.0, 24.0)
BARS = {False: 5.0, True: 15.0}


def seconds(name: str, card: float | None, directory: Path) -> tuple[float, MemoryPlan]:
    """CPU seconds of a plan, or of `--fit` for a card of so many GiB, and what was found."""
    config = directory / name / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps(MODELS[name].to_dict()), encoding="utf-8")
    small = read_command("plan", ["--model_name_or_path", str(BASE)])
    plan_of(small.args, small.sft, cuda=True)
    told = ["--model_name_or_path", str(config.parent), "--max_length", "2048"]
    asked = read_command("plan", told)
    started = time.process_time()
    if card is None:
        plan = plan_of(asked.args, asked.sft, cuda=True)
    else:
        plan = fit(asked.args, asked.sft, card, True, asked=asked.given).plan
    return time.process_time() - started, plan


def one(name: str, card: float | None) -> dict[str, Any]:
    """A row, of this process."""
    with tempfile.TemporaryDirectory() as directory:
        took, plan = seconds(name, card, Path(directory))
    bar = None if name == "Llama-3-70B" else BARS[card is not None]
    return {
        "model": name,
        "what": "plan" if card is None else f"--fit {card:g}GB",
        "CPU s": round(took, 2),
        "needed GiB": round(plan.needed / 2**30, 2),
        "bar": bar,
        "holds": None if bar is None else took <= bar,
    }


def main() -> None:
    if len(sys.argv) == 3:
        logging.getLogger("leanlift").setLevel(logging.ERROR)
        print(json.dumps(one(sys.argv[1], float(sys.argv[2]) or None)))
        return
    if os.environ.get("LEANLIFT_PLANS") != "off":
        raise SystemExit("set LEANLIFT_PLANS=off: a plan that was kept takes no time")
    rows = []
    for name in NAMED:
        for card in (None, CARDS[-1]) if name == "Llama-3-70B" else CARDS:
            command = [sys.executable, "-m", "benchmarks.plan_seconds", name, f"{card or 0:g}"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    print(f"Wrote {write_rows('plan_seconds', rows)}")


if __name__ == "__main__":
    main()
