"""Makes the runs that are missing: a sweep of the learning rate per method and budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.real.base import Base
from benchmarks.quality.real.measure import Losses, losses
from benchmarks.quality.real.methods import CALIBRATION, LeftOutError, Setting
from benchmarks.quality.real.plan import BITS_16, BITS_32, NF4, Job, Preset
from benchmarks.quality.real.steps import Schedule, order, train
from benchmarks.quality.real.store import Key, Row, Store, key_of
from benchmarks.quality.real.texts import SOURCES, Texts, TokenRow
from leanlift import UserError

EXTENSIONS = 4
HALF = 2
"""Quarter decades in a half."""
BASES = {NF4: "base, NF4", BITS_16: "base, 16 bits", BITS_32: "base, 32 bits"}
TOKENS = "tokens that count"
"""The line of the rows' file that says how many tokens of each row count."""


def rate(quarter: int) -> float:
    """The learning rate 10^(k/4)."""
    return float(10 ** (quarter / 4))


@dataclass
class Runner:
    """Makes runs of one base.

    Attributes:
        base, texts, preset: what is taught to what, and for how long.
        store: where runs go, and are found.
        say: told about each run.
    """

    base: Base
    texts: Texts
    preset: Preset
    store: Store
    say: Callable[[str], None] = print

    def bases(self) -> None:
        """The losses before: of the base in each form, and how many tokens each row has."""
        counted = {
            name: Losses([float(row.counted) for row in rows], [True] * len(rows))
            for name, rows in self.texts.asked.items()
        }
        tokens = key_of(0, TOKENS, 0, 0)
        if self.store.find(tokens) is None:
            self._keep(tokens, "base", "", counted, {})
        for form, name in BASES.items():
            key = key_of(0, name, 0, 0)
            if self.store.find(key) is None:
                started = time.perf_counter()
                asked = self._ask(self.base.load(form))
                self._keep(key, "base", form, asked, {}, started)

    def job(self, job: Job) -> None:
        """A sweep with the first seed in half decades, then the quarters beside the best where the
        job is refined, then the other seeds at the best."""
        tried = sorted(HALF * step for step in job.lrs)
        for step in tried:
            self.run(job, step, 0)
        for _ in range(EXTENSIONS):
            best = self.best(job, tried)
            if best is None or best not in (tried[0], tried[-1]):
                break
            tried = [tried[0] - HALF, *tried] if best == tried[0] else [*tried, tried[-1] + HALF]
            self.run(job, tried[0], 0)
            self.run(job, tried[-1], 0)
        best = self.best(job, tried)
        if job.refined and best is not None:
            tried += [best - 1, best + 1]
            self.run(job, best - 1, 0)
            self.run(job, best + 1, 0)
            best = self.best(job, tried)
        for seed in range(1, job.seeds):
            if best is not None:
                self.run(job, best, seed)

    def best(self, job: Job, tried: list[int]) -> int | None:
        """The quarter decade with the least loss on the validation rows; None: left out."""
        found = {
            step: float(row["valid"])
            for step in tried
            if (row := self.store.find(self.key(job, step, 0))) is not None and row["valid"] != ""
        }
        return min(found, key=lambda step: found[step]) if found else None

    def key(self, job: Job, quarter: int, seed: int) -> Key:
        return key_of(job.density, job.method.name, rate(quarter), seed)

    def run(self, job: Job, quarter: int, seed: int) -> None:
        """One run, if it has not been made."""
        key = self.key(job, quarter, seed)
        if self.store.find(key) is not None:
            return
        started, method, schedule = time.perf_counter(), job.method, self.preset.schedule
        base, r = self.base, self.base.rank(job.density)
        setting = Setting(base, r, seed, self._calibration(schedule, seed))
        try:
            prepared = method.build(setting)
        except (LeftOutError, UserError) as error:
            nothing = {name: Losses([math.nan] * len(rows), []) for name, rows in self._sets()}
            self._keep(key, method.group, method.form, nothing, {"note": str(error)}, started)
            return
        built = time.perf_counter() - started
        trained = train(prepared, self.texts.train, base, schedule, rate(quarter), seed)
        asked = self._ask(prepared.model)
        more = {
            "r": r,
            "steps": schedule.steps,
            "batch": schedule.batch,
            "trained": trained.parameters,
            "step_ms": round(trained.step_ms, 1),
            "build_s": round(built, 1),
            "note": "" if trained.finite else "a loss was not finite",
        }
        self._keep(key, method.group, method.form, asked, more, started)

    def _sets(self) -> list[tuple[str, list[TokenRow]]]:
        return list(self.texts.asked.items())

    def _calibration(self, schedule: Schedule, seed: int) -> list[list[TokenRow]]:
        """The first batches that training will see."""
        rows = self.texts.train
        batches = order(len(rows), Schedule(CALIBRATION, schedule.batch), seed)
        return [[rows[at] for at in batch] for batch in batches]

    def _ask(self, model: Any) -> dict[str, Losses]:
        return {name: losses(model, rows, self.base) for name, rows in self._sets()}

    def _keep(
        self,
        key: Key,
        group: str,
        form: str,
        asked: dict[str, Losses],
        more: Row,
        started: float | None = None,
    ) -> None:
        means = {name: self._mean(name, of) for name, of in asked.items()}
        right = asked["probes"].right
        row = {
            "group": group,
            "form": form,
            **{name: more.get(name, "") for name in COLUMNS},
            **means,
            "source": _round(sum(means[name] for name in SOURCES) / len(SOURCES))
            if "" not in means.values()
            else "",
            "probes_right": _round(sum(right) / len(right)) if right else "",
            "dtype": str(self.base.dtype).removeprefix("torch."),
            "seconds": "" if started is None else round(time.perf_counter() - started, 1),
        }
        self.store.add(key, row, asked)
        self.say(
            f"{key[0]} | {key[1]} | lr {key[2]} | seed {key[3]} | valid {row['valid']} | test "
            f"{row['test']} | source {row['source']} | probes {row['probes_right']} | "
            f"{row['seconds']} s {row['note']}"
        )

    def _mean(self, name: str, of: Losses) -> float | str:
        tokens = sum(row.counted for row in self.texts.asked[name])
        mean = sum(of.nats) / tokens
        return _round(mean) if math.isfinite(mean) else ""


COLUMNS = ("r", "steps", "batch", "trained", "step_ms", "build_s", "note")


def _round(value: float) -> float:
    return round(value, 5)
