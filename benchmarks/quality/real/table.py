"""From the runs to the tables of the README and the pictures."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.quality.real.compare import (
    Bootstrap,
    Curve,
    Figure,
    Measured,
    figure,
    forgotten,
    increases_at_equal_target,
    learned,
)
from benchmarks.quality.real.plan import BITS_16, BITS_32, NF4, PRINCIPAL, PRINCIPAL_16, QLORA
from benchmarks.quality.real.run import BASES, TOKENS
from benchmarks.quality.real.store import Key, Row, Store, key_of

REFERENCE = {NF4: PRINCIPAL, BITS_16: PRINCIPAL_16, BITS_32: PRINCIPAL_16}
Compare = Callable[[Measured, Measured], Figure]
SETS = ("test", "prose", "code", "chat")
LEAST = 3
"""Learning rates below which nothing is said of a method: its best one may be yet to come."""


@dataclass(frozen=True)
class Line:
    """A method at a budget, measured.

    Attributes:
        rows: its runs at the best learning rate, a seed each.
        swept: its runs with the first seed, by learning rate.
        by_lr: all its runs, of the same learning rates.
        curve, measured: of all of them.
    """

    name: str
    form: str
    rows: list[Row]
    swept: list[Row]
    by_lr: list[list[Row]]
    curve: Curve
    measured: Measured

    @property
    def seeds(self) -> set[str]:
        """Of the runs at the best learning rate."""
        return {row["seed"] for row in self.rows}


class Results:
    """All lines of a store, by density and method.

    Args:
        store: the runs.
        resamples: of the bootstrap.
    """

    def __init__(self, store: Store, resamples: int) -> None:
        self.runs, nats = store.runs(), store.nats()
        self.nats: dict[Key, dict[str, Tensor]] = nats
        tokens = nats[key_of(0, TOKENS, 0, 0)]
        self.bases = {form: nats[key_of(0, name, 0, 0)] for form, name in BASES.items()}
        self.bootstrap = Bootstrap({name: tokens[name] for name in SETS}, resamples)
        self.lines: dict[str, dict[str, Line]] = {}
        self.left_out: dict[str, str] = {}
        grouped: dict[tuple[str, str], list[Row]] = {}
        for row in self.runs:
            if row["group"] == "base":
                continue
            if row["valid"] == "":
                self.left_out[row["method"]] = row["note"]
                continue
            grouped.setdefault((row["density"], row["method"]), []).append(row)
        for (density, method), rows in grouped.items():
            if len({row["lr"] for row in rows}) < LEAST:
                self.left_out[f"{method} at {float(density):.1%}"] = "its sweep is not finished"
                continue
            self.lines.setdefault(density, {})[method] = self._line(method, rows)

    def _line(self, method: str, rows: list[Row]) -> Line:
        swept = sorted((row for row in rows if row["seed"] == "0"), key=lambda r: float(r["lr"]))
        best = min(range(len(swept)), key=lambda at: float(swept[at]["valid"]))
        by_lr = [[row for row in rows if row["lr"] == one["lr"]] for one in swept]
        curve, form = self._curve(by_lr, best), rows[0]["form"]
        measured = self.bootstrap.measure(curve, self.bases[form])
        return Line(method, form, by_lr[best], swept, by_lr, curve, measured)

    def _curve(self, by_lr: list[list[Row]], best: int) -> Curve:
        nats = {
            name: torch.stack(
                [torch.stack([self._of(row, name) for row in of]).mean(0) for of in by_lr]
            )
            for name in SETS
        }
        return Curve(tuple(float(of[0]["lr"]) for of in by_lr), nats, best)

    def of_same_seeds(self, line: Line, other: Line) -> tuple[Measured, Measured]:
        """Both of the seeds that both have at their best, or the noise of seeds, which is that of
        the order of rows, would be in the difference; of the first where a rate has no other."""
        both = line.seeds & other.seeds
        return self._measured(line, both), self._measured(other, both)

    def _measured(self, line: Line, seeds: set[str]) -> Measured:
        if line.seeds == seeds:
            return line.measured
        by_lr = [[r for r in of if r["seed"] in seeds] or of[:1] for of in line.by_lr]
        curve = self._curve(by_lr, line.curve.best)
        return self.bootstrap.measure(curve, self.bases[line.form])

    def _of(self, row: Row, name: str) -> Tensor:
        return self.nats[row["density"], row["method"], row["lr"], row["seed"]][name]

    def reference(self, density: str, line: Line) -> Line | None:
        """What a line is compared with: principal weights over the same form of the base."""
        return self.lines[density].get(REFERENCE[line.form])

    def before(self, form: str) -> Row:
        return next(row for row in self.runs if row["method"] == BASES[form])


def tables(results: Results) -> list[str]:
    """All tables as markdown: facts, a table for each budget, candidates, sweeps."""
    out = [_facts(results), _bases(results)]
    for density, lines in results.lines.items():
        out.append(_budget(results, density, lines, "headline"))
        for group, title in (("candidate", "Other choices of entries"), ("variant", "Variants")):
            if any(line.rows[0]["group"] == group for line in lines.values()):
                out.append(_budget(results, density, lines, group, title))
        out.append(_sweeps(density, lines))
    for density, lines in results.lines.items():
        if PRINCIPAL in lines and QLORA in lines:
            out.append(_goal(density, lines[PRINCIPAL], lines[QLORA]))
    if results.left_out:
        out.append("Left out: " + "; ".join(f"{n}: {why}" for n, why in results.left_out.items()))
    return out


def _facts(results: Results) -> str:
    runs = [row for row in results.runs if row["step_ms"] != ""]
    seconds = sum(float(row["seconds"]) for row in results.runs if row["seconds"] != "")
    last = runs[-1]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in runs))
    versions = ", ".join(f"{of} {last[of]}" for of in ("torch", "transformers", "bitsandbytes"))
    return (
        f"{last['steps']} steps of {last['batch']} rows, products in {_dtypes(runs)}; {len(runs)} "
        f"runs, {seconds / 3600:.1f} hours of one process; {last['device']}; {versions}; commit "
        f"{commits}."
    )


def _dtypes(runs: Sequence[Row]) -> str:
    """Of products, the most common first: not every machine multiplies in bf16."""
    counted = Counter(row["dtype"] for row in runs).most_common()
    if len(counted) == 1:
        return counted[0][0]
    return ", ".join(f"{dtype} ({count} runs)" for dtype, count in counted)


def _bases(results: Results) -> str:
    lines = []
    for form, name in BASES.items():
        row = results.before(form)
        cells = [f"{float(row[column]):.3f}" for column in (*SETS, "probes_right")]
        lines.append([name, *cells])
    return _markdown("Before training:", ["", "target", *SETS[1:], "probes right"], lines)


def _budget(
    results: Results, density: str, lines: Mapping[str, Line], group: str, title: str = ""
) -> str:
    shown = [line for line in lines.values() if line.rows[0]["group"] == group]
    cells = []
    for line in shown:
        reference = results.reference(density, line)
        target, increase = line.measured.at_best()
        apart = [_versus(results, line, reference, how) for how in (learned, forgotten)]
        cells.append(
            [
                line.name,
                f"{line.curve.lrs[line.curve.best]:.2g}",
                f"{int(line.rows[0]['trained']):,}",
                f"{float(target[0]):.4f}",
                apart[0],
                _signed(figure(increase)),
                apart[1],
                _probes(line),
                _seeds(line, reference, results),
            ]
        )
    heading = f"**{title or 'Methods'} at {float(density):.1%}**"
    return _markdown(
        heading,
        ["method", "lr", "trained", "target loss", "less principal's", "source rises by",
         "less principal's, where as much is learned", "probes right",
         "target less principal's, by seed"],
        cells,
    )  # fmt: skip


def _versus(results: Results, line: Line, reference: Line | None, compare: Compare) -> str:
    if reference is None or reference.name == line.name:
        return "–"
    found = compare(*results.of_same_seeds(line, reference))
    word = "level" if not found.sure else "worse" if found.value > 0 else "**better**"
    return f"{_signed(found)} {word}"


def _signed(found: Figure) -> str:
    return f"{found.value:+.4f} ± {found.error:.4f}"


def _probes(line: Line) -> str:
    return f"{statistics.mean(float(row['probes_right']) for row in line.rows):.3f}"


def _seeds(line: Line, reference: Line | None, results: Results) -> str:
    """The difference of the target's loss for each seed that both have at their best."""
    if reference is None or reference.name == line.name:
        return "–"
    theirs = {row["seed"]: row for row in reference.rows}
    both = [(row, theirs[row["seed"]]) for row in line.rows if row["seed"] in theirs]
    return ", ".join(f"{float(a['test']) - float(b['test']):+.4f}" for a, b in both)


def _sweeps(density: str, lines: Mapping[str, Line]) -> str:
    lrs = sorted({lr for line in lines.values() for lr in line.curve.lrs})
    cells = []
    for line in lines.values():
        at = dict(zip(line.curve.lrs, range(len(lrs)), strict=False))
        target, rise = line.measured.target[0], line.measured.increase[0]
        cells.append(
            [line.name]
            + [f"{target[at[lr]]:.3f} / {rise[at[lr]]:+.3f}" if lr in at else "" for lr in lrs]
        )
    return _markdown(
        f"The sweeps at {float(density):.1%}, target loss / rise of the source's:",
        ["method", *(f"{lr:.2g}" for lr in lrs)],
        cells,
    )


def _goal(density: str, ours: Line, theirs: Line) -> str:
    """What the project wants of itself, of QLoRA."""
    apart = learned(ours.measured, theirs.measured)
    a, b = increases_at_equal_target(ours.measured, theirs.measured)
    a_, b_ = figure(a), figure(b)
    share = f", {a_.value / b_.value:.0%} of it" if b_.value > 0 else ""
    return (
        f"Principal against QLoRA at {float(density):.1%}: target loss {_signed(apart)}; where as "
        f"much is learned the source's rises by {_signed(a_)} against {_signed(b_)}{share}."
    )


def _markdown(title: str, head: list[str], lines: list[list[str]]) -> str:
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([title, "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|", *rows])
