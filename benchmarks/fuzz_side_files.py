"""Damage the files beside an adapter at random, and see what the commands that read them say.

    python -m benchmarks.fuzz_side_files [--count 2000] [--seed 0] [--only NUMBER]

`memory.json`, `run.json` and the tokenizer's files of a short run are mutated in the ways of
`adapter_mutations`; the adapter itself is left as it is. Then `report`, `info`, an export in PEFT's
form, a merge or an evaluation of the damaged directory is run as from the command line.

Claim: each outcome is exit code 0, or exit code 2 with one sentence on stderr that begins with
"leanlift: "; a merge that was refused has left nothing behind. A case that asks for more than
2 GiB, or for more than 20 s, counts as failed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import shutil
import tempfile
import traceback
from collections import Counter
from pathlib import Path

from benchmarks.adapter_mutations import MUTATIONS, Files
from benchmarks.common import write_rows
from benchmarks.fuzz_adapter import limits
from leanlift.cli import main as leanlift
from leanlift.demo.run import BASE
from leanlift.demo.skills import TARGET_SKILL, make_rows

SIDE = ("memory.json", "run.json", "tokenizer.json", "tokenizer_config.json")
TEXTS = tuple(
    m for m in MUTATIONS if m.__name__.startswith("config_") or m.__name__ == "whole_file"
)
COMMANDS = ("report", "info", "peft", "merge", "eval")
OUTCOMES = ("done", "refused", "failed")


def make_run(directory: Path) -> Path:
    """A run of two steps, with its report and tokenizer beside the adapter."""
    rows, made = directory / "rows.jsonl", make_rows(TARGET_SKILL, 8, split="train")
    rows.write_text("".join(json.dumps(row) + "\n" for row in made))
    run = directory / "run"
    argv = [
        "train", "--model_name_or_path", str(BASE), "--dataset_name", str(rows), "--output_dir",
        str(run), "--approx_rank", "4", "--density", "0.01", "--max_steps", "2", "--max_length",
        "64", "--save_strategy", "no", "--gradient_checkpointing", "false", "--load_in_4bit",
        "false", "--per_device_train_batch_size", "2",
    ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert leanlift(argv) == 0
    return run


def arguments(command: str, run: Path, out: Path) -> list[str]:
    return {
        "report": ["report", str(run)],
        "info": ["info", str(run)],
        "peft": ["export", str(run), str(out), "--format", "peft"],
        "merge": ["export", str(run), str(out)],
        "eval": ["eval", "--adapter", str(run), "--data", str(run.parent / "rows.jsonl"),
                 "--max_new_tokens", "0"],
    }[command]  # fmt: skip


def outcome(command: str, run: Path, out: Path) -> tuple[str, str]:
    """What a command made of a damaged directory, and why that counts as failed."""
    said = io.StringIO()
    try:
        with limits(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            code = leanlift(arguments(command, run, out))
    except BaseException:
        return "failed", traceback.format_exc()
    if code == 0:
        return "done", ""
    sentences = [line for line in said.getvalue().splitlines() if line.startswith("leanlift: ")]
    if code != 2 or len(sentences) != 1:
        return "failed", f"exit code {code}: {said.getvalue()[-500:]}"
    return ("failed", f"left {out} behind") if out.exists() else ("refused", "")


def fuzz(
    count: int, seed: int, work: Path, only: int | None = None
) -> dict[tuple[str, str], Counter[str]]:
    """Outcomes by command and mutation; failures are printed."""
    run = make_run(work)
    files: Files = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    side = [name for name in SIDE if name in files]
    found: dict[tuple[str, str], Counter[str]] = {}
    for number in range(count) if only is None else [only]:
        chance = random.Random(f"{seed}:{number}")
        name = chance.choice(side)
        damaged = {name: files[name]}
        mutations = chance.choices(TEXTS, k=chance.choice((1, 1, 2)))
        for mutation in mutations:
            if damaged:
                mutation(chance, damaged)
        for kept, data in {**files, **damaged}.items():
            (run / kept).write_bytes(data)
        if not damaged:
            (run / name).unlink()
        command = chance.choice(COMMANDS)
        out = work / "out"
        result, why = outcome(command, run, out)
        if result == "failed":
            print(f"case {number}, {command}, {[m.__name__ for m in mutations]}:\n{why}")
        shutil.rmtree(out, ignore_errors=True)
        key = command, mutations[0].__name__
        found.setdefault(key, Counter())[result] += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one case by its number")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        found = fuzz(options.count, options.seed, Path(work), options.only)
    rows = [
        {"command": command, "mutation": mutation, "seed": options.seed,
         **{name: counts[name] for name in OUTCOMES}}
        for (command, mutation), counts in sorted(found.items())
    ]  # fmt: skip
    failed = sum(row["failed"] for row in rows)
    if options.only is None:
        print(f"Wrote {write_rows('fuzz_side_files', rows)}")
    print(f"{failed} failed of {sum(sum(c.values()) for c in found.values())}")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
