"""Damage training checkpoints at random, and see how a run goes on from them.

    python -m benchmarks.fuzz_checkpoint [--count 2000] [--seed 0] [--only NUMBER]

A short run leaves checkpoints at steps 2 and 4 of 6. The newer one is damaged in one of the ways of
`adapter_mutations`, applied to any of its tensor and JSON files, or by mixing in files of the older
one. Then the run is resumed, from the last checkpoint that is whole or from the damaged one by its
path. Three forms: sealed ones, as they are written; forged ones, whose seal was made again after
the damage; and older ones, with pickled schedule and random numbers and no seal.

Claim: each outcome is a run that ends with the bytes of the undamaged one, from either checkpoint,
or a `UserError`. A sealed checkpoint that is damaged is never a reason to stop while an older one
is whole. Without a true seal, damage that keeps a file plausible cannot be seen: the run may end
otherwise then, but with finite values, and after it was said. Nothing is executed, or written
elsewhere. A case that asks for more than 2 GiB, or for more than 20 s, counts as failed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

from benchmarks.adapter_mutations import MUTATIONS, WEIGHTS, Files
from benchmarks.common import write_rows
from benchmarks.fuzz_adapter import limits
from leanlift import LiftConfig, LiftTrainer, UserError, get_lift_model
from leanlift.demo.run import BASE
from leanlift.demo.skills import TARGET_SKILL, make_rows
from leanlift.model import lift_layers
from leanlift.training import LiftSFTConfig
from leanlift.training.checkpointing.directory import put_in_place
from leanlift.training.checkpointing.whole import RANDOM, SCHEDULE, SEAL

NEW, OLD = "checkpoint-4", "checkpoint-2"
FORMS = ("sealed", "forged", "older")
WAYS = ("last", "path")
OUTCOMES = ("same", "same from the older one", "refused", "other, said", "failed")
OPTIMIZERS = ("sparse_adamw_8bit", "adamw_torch")
SAID = "Its content is checked"


class Run:
    """A run whose trainer can go on from any directory, again and again."""

    def __init__(self, optim: str, work: Path) -> None:
        dtype = "bfloat16" if optim.startswith("sparse") else "float32"
        lift = LiftConfig(approx_rank=4, refresh_interval=3, density=0.02, values_dtype=dtype)
        model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        rows = make_rows(TARGET_SKILL, 40, split="train")
        self.trainer = LiftTrainer(
            model=get_lift_model(model, lift, progress=False),
            args=LiftSFTConfig(
                output_dir=str(work / optim),
                use_cpu=True,
                bf16=False,
                optim=optim,
                learning_rate=1e-3,
                per_device_train_batch_size=2,
                max_steps=6,
                max_length=64,
                save_strategy="steps",
                save_steps=2,
                gradient_checkpointing=False,
                disable_tqdm=True,
                report_to="none",
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(BASE),
        )
        self.trainer.remove_callback(PrinterCallback)
        self.state = self.trainer._lift
        self.config = self.state.config
        self.trainer.train()
        self.wanted = self.learned()
        self.trainer.args.save_strategy = "no"
        self.files = {name: files_of(work / optim / name) for name in (NEW, OLD)}
        self.older = {name: as_older_versions_wrote(files) for name, files in self.files.items()}

    def learned(self) -> list[torch.Tensor]:
        found = []
        for layer in lift_layers(self.trainer.model).values():
            found += [layer.index.to_flat(), layer.values.detach()]
            if layer.retired_index is not None and layer.retired_values is not None:
                found += [layer.retired_index.to_flat(), layer.retired_values]
        return [tensor.clone() for tensor in found]

    def go_on(self, output: Path, from_path: bool) -> None:
        self.state.config, self.state.refreshes = self.config, 0
        self.trainer.args.output_dir = str(output)
        self.trainer.optimizer = None
        self.trainer.train(str(output / NEW) if from_path else True)


def files_of(directory: Path) -> Files:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


def as_older_versions_wrote(files: Files) -> Files:
    """Without a seal, with what Trainer pickles."""
    kept = {name: data for name, data in files.items() if name not in (SEAL, SCHEDULE, RANDOM)}
    state = json.loads(files[RANDOM])
    version, words, gauss = state["python"]
    kind, numpy_words, place, has_gauss, cached = state["numpy"]
    pickled = {
        "scheduler.pt": json.loads(files[SCHEDULE]),
        "rng_state.pth": {
            "python": (version, tuple(words), gauss),
            "numpy": (kind, np.array(numpy_words, dtype=np.uint32), place, has_gauss, cached),
            "cpu": torch.frombuffer(bytearray.fromhex(state["cpu"]), dtype=torch.uint8),
        },
    }
    for name, content in pickled.items():
        with tempfile.TemporaryFile() as file:
            torch.save(content, file)
            file.seek(0)
            kept[name] = file.read()
    return kept


# --- damage --------------------------------------------------------------------------------


def damage(chance: random.Random, files: Files, older: Files, kind: int) -> str:
    """Change `files` in place; returns the name of the first kind of damage."""
    kinds: list[Callable[..., None]] = [*MUTATIONS, mixing]
    chosen = [kinds[kind % len(kinds)]]
    chosen += chance.choices(kinds, k=chance.choice((0, 0, 0, 1)))
    for mutate in chosen:
        if mutate is mixing:
            mixing(chance, files, older)
            continue
        tensors = [name for name in files if name.endswith(".safetensors")]
        if not tensors or not any(name.endswith(".json") for name in files):
            continue  # nothing is left to damage
        name = chance.choice(sorted(tensors))  # it stands where the mutations look for one
        view = {key: data for key, data in files.items() if key not in tensors}
        view[WEIGHTS] = files[name]
        mutate(chance, view)
        kept = {key: data for key, data in files.items() if key in tensors and key != name}
        changed = view.pop(WEIGHTS, None)
        files.clear()
        files.update(view | kept | ({} if changed is None else {name: changed}))
    return chosen[0].__name__


def mixing(chance: random.Random, files: Files, older: Files) -> None:
    """Files of another step of the same run, each whole."""
    names = sorted(set(files) & set(older))
    for name in chance.sample(names, min(len(names), chance.choice((1, 2, 5)))):
        files[name] = older[name]


# --- one case ------------------------------------------------------------------------------


class Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def outcome_of(run: Run, output: Path, form: str, from_path: bool) -> str:
    """Resume, and say how it ended.

    Raises:
        AssertionError: it ended as it must not.
    """
    said, logger = Said(), logging.getLogger("leanlift")
    logger.addHandler(said)
    try:
        with limits():
            run.go_on(output, from_path)
    except UserError:
        assert form != "sealed" or from_path, "an older checkpoint is whole"
        return "refused"
    finally:
        logger.removeHandler(said)
    resumed = next(line for line in said.lines if line.startswith("Resuming from"))
    learned = run.learned()
    same = len(learned) == len(run.wanted) and all(map(torch.equal, learned, run.wanted))
    if same:
        return "same" if NEW in resumed else "same from the older one"
    assert form != "sealed", "a damaged checkpoint was taken"
    assert form == "forged" or any(SAID in line for line in said.lines), "it was not said"
    assert all(bool(torch.isfinite(tensor).all()) for tensor in learned), "NaN or infinity"
    return "other, said"


def put(output: Path, form: str, new: Files, old: Files) -> None:
    shutil.rmtree(output, ignore_errors=True)
    for name, files in ((OLD, old), (NEW, new)):
        directory = output / (".saving/" + name if form == "forged" and name == NEW else name)
        directory.mkdir(parents=True)
        for file, data in files.items():
            (directory / file).write_bytes(data)
    if form == "forged":
        try:
            settings = json.loads(old[SEAL])["settings"]
        except (ValueError, KeyError):
            settings = {}
        put_in_place(output / ".saving" / NEW, settings)


def fuzz(count: int, seed: int, only: int | None, work: Path) -> tuple[list[dict[str, Any]], int]:
    """One row per form, way and kind of damage; and how many cases failed."""
    runs = [Run(optim, work) for optim in OPTIMIZERS]
    output = work / "output"
    os.chdir(work)
    before = {path for path in work.rglob("*") if output not in (path, *path.parents)}
    tally: Counter[tuple[str, str, str, str]] = Counter()
    for number in range(count) if only is None else [only]:
        chance = random.Random(f"{seed}:{number}")
        run, form, way = chance.choice(runs), chance.choice(FORMS), chance.choice(WAYS)
        files = run.older if form == "older" else run.files
        new = dict(files[NEW])
        kind = damage(chance, new, files[OLD], number)
        put(output, form, new, files[OLD])
        try:
            outcome = outcome_of(run, output, form, way == "path")
            now = {path for path in work.rglob("*") if output not in (path, *path.parents)}
            assert now == before, f"something was written: {now ^ before}"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            outcome = "failed"
            print(f"--seed {seed} --only {number} ({form}, {kind}, {way}): {error!r:.300}")
            if only is not None:
                traceback.print_exc()
        tally[kind, form, way, outcome] += 1
    keys = sorted({key[:3] for key in tally})
    rows = [
        {"mutation": kind, "form": form, "way": way, "seed": seed}
        | {outcome: tally[kind, form, way, outcome] for outcome in OUTCOMES}
        for kind, form, way in keys
    ]
    return rows, sum(row["failed"] for row in rows)


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'form, way':<18}" + "".join(f"{outcome:>25}" for outcome in OUTCOMES))
    for form in FORMS:
        for way in WAYS:
            own = [row for row in rows if (row["form"], row["way"]) == (form, way)]
            sums = [sum(row[outcome] for row in own) for outcome in OUTCOMES]
            print(f"{form + ', ' + way:<18}" + "".join(f"{value:>25}" for value in sums))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one case, with its messages")
    parser.add_argument("--no_csv", action="store_true", help="only print")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = Path.cwd()
    with tempfile.TemporaryDirectory() as work:
        rows, failed = fuzz(arguments.count, arguments.seed, arguments.only, Path(work).resolve())
        os.chdir(start)
    print_table(rows)
    if not arguments.no_csv and arguments.only is None:
        print(f"Wrote {write_rows('fuzz_checkpoint', rows)}")
    if failed:
        raise SystemExit(f"{failed} cases ended as they must not")


if __name__ == "__main__":
    main()
