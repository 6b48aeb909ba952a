"""Two or more runs side by side: what was set differently, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from leanlift.errors import UserError
from leanlift.format import change, count, duration, loss, size, table
from leanlift.io.measured import categories_compared
from leanlift.report.data import Points, Run

MOST_RUNS = 4
KEPT = "change of loss,"
FIRST = 24
NO_SETTINGS = ("output_dir", "leanlift_version", "merged_dir")


def compare_runs(runs: Sequence[Run]) -> dict[str, Any]:
    """What differs and what came out, JSON-ready: `settings` (name -> one value per run, None where
    a run has none) and `results` (name -> one number per run).

    Raises:
        UserError: more runs than a table of 80 columns has room for.
    """
    if len(runs) > MOST_RUNS:
        raise UserError(f"expected at most {MOST_RUNS} runs to compare, got {len(runs)}.")
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in NO_SETTINGS)
    settings = {key: [run.settings.get(key) for run in runs] for key in keys}
    return {
        "runs": [str(run.directory) for run in runs],
        "settings": {key: values for key, values in settings.items() if len(set(values)) > 1},
        "results": {
            **{name: [read(run) for run in runs] for name, (read, _) in RESULTS.items()},
            **_kept(runs),
        },
    }


def compare_text(runs: Sequence[Run]) -> str:
    """The same as a table of 80 columns."""
    data = compare_runs(runs)
    room = (80 - FIRST) // len(runs) - 2
    head = [_cut(name, room) for name in _names(runs)]
    differing = [
        [_cut(key, FIRST), *(_cut("–" if v is None else v, room) for v in values)]
        for key, values in data["settings"].items()
    ]
    results = [
        [_cut(name, FIRST), *("–" if v is None else _words(name)(v) for v in values)]
        for name, values in data["results"].items()
        if any(value is not None for value in values)
    ]
    lines = table(differing, ["what was set differently", *head]) if differing else []
    if not differing:
        lines = ["These runs were set alike, as far as their run.json says."]
    lines += ["", *table(results, ["what came of it", *head])]
    lines += ["", *_best(runs, data)]
    return "\n".join(lines).rstrip()


def _kept(runs: Sequence[Run]) -> dict[str, list[float | None]]:
    """By how much the loss on rows that were to be kept has changed, by their names."""
    names = dict.fromkeys(kept.name for run in runs for kept in run.kept)
    changes = [{kept.name: kept.change for kept in run.kept} for run in runs]
    return {f"{KEPT} {name}": [found.get(name) for found in changes] for name in names}


def _words(name: str) -> Callable[[Any], str]:
    return RESULTS[name][1] if name in RESULTS else change


def _names(runs: Sequence[Run]) -> list[str]:
    """The directories' names; where two are alike, their whole paths."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.directory) for run in runs]


def _cut(text: str, room: int) -> str:
    """Its end, where it is too long: that is where paths and numbers differ."""
    return text if len(text) <= room else "…" + text[1 - room :]


def _best(runs: Sequence[Run], data: dict[str, Any]) -> list[str]:
    """Which run ended with the lowest loss on evaluation rows, if all have some."""
    losses = data["results"]["evaluation loss, last"]
    rows = {run.settings.get("eval_dataset_name") for run in runs}
    if None in losses or len(runs) < 2 or len(rows) != 1:
        return []
    best = min(range(len(losses)), key=losses.__getitem__)
    return [f"Lowest loss on evaluation rows at the end: {_names(runs)[best]}."]


def _of(points: Callable[[Run], Points], pick: Callable[[Points], float]) -> Callable[[Run], Any]:
    def read(run: Run) -> float | None:
        found = [] if run.curve is None else points(run)
        return pick(found) if found else None

    return read


def _loss(run: Run) -> Points:
    return [] if run.curve is None else run.curve.loss


def _eval_loss(run: Run) -> Points:
    return [] if run.curve is None else run.curve.eval_loss


def _peak(run: Run) -> int | None:
    rows = [] if run.memory is None else categories_compared(run.memory)
    return rows[-1].measured if rows else None


def _training_time(run: Run) -> float | None:
    train = None if run.memory is None else run.memory["phases"].get("train")
    return None if train is None else train["seconds"]


def _steps(run: Run) -> int | None:
    return run.curve.steps if run.curve is not None and run.curve.steps else None


def _per_step(run: Run) -> float | None:
    seconds = None if run.curve is None else run.curve.seconds
    steps = _steps(run)
    return seconds / steps if seconds is not None and steps else None


def _refreshes(run: Run) -> int | None:
    return None if run.adapter is None else run.adapter.refreshes


RESULTS: dict[str, tuple[Callable[[Run], Any], Callable[[Any], str]]] = {
    "loss, first": (_of(_loss, lambda points: points[0][1]), loss),
    "loss, last": (_of(_loss, lambda points: points[-1][1]), loss),
    "evaluation loss, first": (_of(_eval_loss, lambda points: points[0][1]), loss),
    "evaluation loss, last": (_of(_eval_loss, lambda points: points[-1][1]), loss),
    "steps": (_steps, count),
    "training time": (_training_time, duration),
    "time per step": (_per_step, duration),
    "peak of training": (_peak, size),
    "trained entries": (lambda r: None if r.adapter is None else r.adapter.entries, count),
    "retired entries": (lambda r: None if r.adapter is None else r.adapter.retired, count),
    "refreshes": (_refreshes, count),
}
"""Name -> how it is read from a run, how it is shown."""
