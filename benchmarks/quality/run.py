"""Which runs are made: sweep the learning rate, extend it, repeat the best over seeds."""

from __future__ import annotations

import csv
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import environment
from benchmarks.quality.base import load
from benchmarks.quality.change import change, trained_weights
from benchmarks.quality.domain import Domain
from benchmarks.quality.loop import Schedule, train
from benchmarks.quality.methods import Method, Prepared
from benchmarks.quality.residual import onto_original
from benchmarks.quality.score import Score, score
from leanlift import merge_adapter, save_adapter

FACTOR = 10**0.5  # between neighbouring learning rates
EXTENSIONS = 3
Row = dict[str, Any]


class Results:
    """Rows of a CSV file, written as they come; a row that is there is not made again.

    Several processes may append to one file: a row is one short write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[Row]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def find(self, domain: str, method: str, lr: float, seed: int) -> Row | None:
        key = (domain, method, f"{lr:.2e}", str(seed))
        for row in self.rows():
            if (row["domain"], row["method"], row["lr"], row["seed"]) == key:
                return row
        return None

    def of(self, domain: str, method: str) -> list[Row]:
        return [r for r in self.rows() if (r["domain"], r["method"]) == (domain, method)]

    def add(self, row: Row) -> Row:
        row = {**row, **environment()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.is_file()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)
        return row


class Runner:
    """Makes the runs of one domain.

    Args:
        domain: what is taught and asked.
        base: directory of the pretrained base.
        schedule: length of a run.
        seeds: how many of them.
        results: where rows go.
        device: where everything happens.
        say: told about each run.
    """

    def __init__(
        self,
        domain: Domain,
        base: Path,
        schedule: Schedule,
        seeds: int,
        results: Results,
        device: torch.device,
        say: Callable[[str], None] = print,
    ) -> None:
        self.domain, self.base, self.schedule = domain, base, schedule
        self.seeds, self.results, self.device, self.say = seeds, results, device, say

    def method(self, method: Method) -> None:
        """Everything about one method."""
        if method.lr_of is None:
            lr = self._sweep(method)
        else:
            parent = self.results.of(self.domain.name, method.lr_of)
            if not parent:
                self.say(f"{method.name}: left out, {method.lr_of} has not been swept")
                return
            lr = best_lr(parent)
        for seed in range(self.seeds):
            self._run(method, lr, seed)

    def frontier(self, method: Method) -> None:
        """All seeds half a decade below the best learning rate too, where less is learned and more
        is kept: methods can only be compared in what they keep where they learn as much."""
        done = self.results.of(self.domain.name, method.name)
        if done:
            for seed in range(self.seeds):
                self._run(method, on_grid(best_lr(done) / FACTOR), seed)

    def _sweep(self, method: Method) -> float:
        tried = sorted(method.lrs)
        for lr in tried:
            self._run(method, lr, 0)
        for _ in range(EXTENSIONS):
            best = best_lr([r for lr in tried if (r := self._found(method, lr))])
            if f"{best:.2e}" == f"{tried[0]:.2e}":
                tried = [tried[0] / FACTOR, *tried]
            elif f"{best:.2e}" == f"{tried[-1]:.2e}":
                tried = [*tried, tried[-1] * FACTOR]
            else:
                break
            self._run(method, tried[0], 0)
            self._run(method, tried[-1], 0)
        return best_lr([r for lr in tried if (r := self._found(method, lr))])

    def _found(self, method: Method, lr: float) -> Row | None:
        return self.results.find(self.domain.name, method.name, lr, 0)

    def _run(self, method: Method, lr: float, seed: int) -> None:
        if self.results.find(self.domain.name, method.name, lr, seed):
            return
        started = time.perf_counter()
        prepared = method.build(self.base, self.domain, seed, self.device)
        prepared.model.train()
        before = self._scores(prepared.model)
        whole = trained_weights(prepared.model)
        schedule = replace(self.schedule, **method.schedule)
        trained = train(prepared, self.domain, schedule, lr, seed, self.device)
        after = self._scores(prepared.model)
        churn = [report.churn for report in trained.refreshes]
        row = {
            "domain": self.domain.name,
            "group": method.group,
            "method": method.name,
            "lr": f"{lr:.2e}",
            "lr_of": method.lr_of or "",
            "seed": seed,
            "steps": schedule.steps,
            "batch": schedule.batch,
            "warm_up": schedule.warm_up,
            "beta2": schedule.beta2,
            "trained": trained.parameters,
            "peak_mib": round(trained.peak_bytes / 2**20, 3),
            "step_ms": round(trained.step_ms, 2),
            **_columns("start", before, self._kept_names()),
            **_columns("end", after, self._kept_names()),
            "answers": self._answers(prepared.model),
            "refreshes": len(churn),
            "churn": round(sum(churn) / len(churn), 5) if churn else "",
            "retired_bytes": trained.refreshes[-1].retired_nbytes if churn else "",
            **change(prepared.model, whole),
            **self._merges(method, prepared),
        }
        row["seconds"] = round(time.perf_counter() - started, 1)
        self.results.add(row)
        self.say(
            f"{self.domain.name} | {method.name} | lr {lr:.2e} | seed {seed} | target "
            f"{row['end_test_exact']} loss {row['end_test_loss']} | kept {row['end_kept_exact']} "
            f"| {row['seconds']} s"
        )

    def _kept_names(self) -> list[str]:
        return list(self.domain.source)

    def _answers(self, model: Any) -> float | str:
        return "" if self.domain.answers is None else round(self.domain.answers(model), 4)

    def _scores(self, model: Any) -> dict[str, Score]:
        sets = {"valid": self.domain.valid, "test": self.domain.test, **self.domain.source}
        return {name: score(model, rows) for name, rows in sets.items()}

    def _merges(self, method: Method, prepared: Prepared) -> Row:
        """Both merges of what was trained, measured as stock models in 32 bits."""
        merged: dict[str, Any] = {}
        if method.merge and prepared.start:
            merged["original"] = onto_original(
                prepared.model, self.base, prepared.start, self.device
            )
        elif method.merge:
            with tempfile.TemporaryDirectory() as directory:
                save_adapter(prepared.model, Path(directory) / "adapter")
                for onto in ("original", "quantized"):
                    out = Path(directory) / onto
                    merge_adapter(Path(directory) / "adapter", out, dtype="float32", onto=onto)
                    merged[onto] = load(out, "dense", self.device)
        row: Row = {}
        for onto in ("original", "quantized"):
            scores = self._scores(merged[onto]) if onto in merged else None
            row[f"{onto}_test_exact"] = round(scores["test"].exact, 4) if scores else ""
            row[f"{onto}_test_loss"] = round(scores["test"].loss, 4) if scores else ""
            kept = [scores[name].exact for name in self.domain.source] if scores else []
            row[f"{onto}_kept_exact"] = round(sum(kept) / len(kept), 4) if kept else ""
        return row


def best_lr(rows: list[Row]) -> float:
    """The learning rate of the sweep, that is in half decades, that did best on the validation
    split with the first seed."""
    swept = [r for r in rows if str(r["seed"]) == "0" and is_half_decade(float(r["lr"]))]
    return on_grid(float(max(swept, key=merit)["lr"]))


def final_rows(rows: list[Row]) -> list[Row]:
    """The rows of a method that are reported: of the learning rates that most seeds have run at,
    the one that is best on the validation split in the mean over seeds."""
    by_lr: dict[str, list[Row]] = {}
    for row in rows:
        by_lr.setdefault(row["lr"], []).append(row)
    most = max(map(len, by_lr.values()))

    def mean_merit(of: list[Row]) -> list[float]:
        return [sum(values) / len(of) for values in zip(*map(merit, of), strict=True)]

    return max((of for of in by_lr.values() if len(of) == most), key=mean_merit)


def merit(row: Row) -> tuple[float, float]:
    """On the validation split: exact match, then loss; loss alone where the former is no
    measure."""
    exact = 0.0 if judged_by_loss(row) else float(row["end_valid_exact"])
    return exact, -float(row["end_valid_loss"])


def on_grid(lr: float) -> float:
    """The nearest quarter decade: a rate that was rounded in the CSV is the same one again."""
    return float(10 ** (round(4 * math.log10(lr)) / 4))


def is_half_decade(lr: float) -> bool:
    return abs(2 * math.log10(lr) - round(2 * math.log10(lr))) < 0.01


def judged_by_loss(row: Row) -> bool:
    """Whether a row is of a domain whose answers are long texts."""
    return row.get("answers", "") != ""


def _columns(when: str, scores: dict[str, Score], kept: list[str]) -> Row:
    row: Row = {}
    for name in ("valid", "test"):
        row[f"{when}_{name}_exact"] = round(scores[name].exact, 4)
        row[f"{when}_{name}_token"] = round(scores[name].token, 4)
        row[f"{when}_{name}_loss"] = round(scores[name].loss, 4)
    row[f"{when}_kept_exact"] = round(sum(scores[n].exact for n in kept) / len(kept), 4)
    row[f"{when}_kept_loss"] = round(sum(scores[n].loss for n in kept) / len(kept), 4)
    each = " ".join(f"{name}={scores[name].exact:.3f}" for name in kept)
    return {**row, f"{when}_kept_each": each}
