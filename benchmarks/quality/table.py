"""From the CSV's rows to the tables of the README, between its markers, and to the plots."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.quality.run import final_rows, is_half_decade, judged_by_loss, on_grid

README = Path(__file__).parent / "README.md"
Row = dict[str, Any]


def update_readme(name: str, rows: list[Row], readme: Path = README, out: Path = RESULTS) -> None:
    """Replace what stands between the markers of `name`, and draw its plots."""
    if not rows:
        return
    text, parts = readme.read_text(encoding="utf-8"), []
    for domain in dict.fromkeys(row["domain"] for row in rows):
        mine = [row for row in rows if row["domain"] == domain]
        parts += [f"**{name}, {domain}**", *tables(mine), draw(name, domain, mine, out)]
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if begin not in text:
        text += f"\n{begin}\n{end}\n"
    block = begin + "\n\n" + "\n\n".join(parts) + "\n\n" + end
    text = re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: block, text, flags=re.S)
    readme.write_text(text, encoding="utf-8")


def tables(rows: list[Row]) -> list[str]:
    """All tables of one domain as markdown."""
    by_method: dict[str, list[Row]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    finals = {name: final_rows(of) for name, of in by_method.items()}
    kind = _kind(rows)
    out = [_facts(rows), _results(finals, kind), _sweeps(by_method), _frontier(by_method, kind)]
    if kind == "exact":
        out.insert(2, _skills(finals))
    refreshed = {n: of for n, of in finals.items() if int(of[0]["refreshes"])}
    if refreshed:
        out.append(_refreshes(refreshed))
    merged = {n: of for n, of in finals.items() if of[0]["original_test_exact"] != ""}
    if merged:
        out.append(_merges(merged, kind))
    starts = {n: of for n, of in finals.items() if n.startswith("start") or of in merged.values()}
    if any(name.startswith("start") for name in starts):
        out.append(_starts(starts))
    return out


def _kind(rows: list[Row]) -> str:
    return "loss" if judged_by_loss(rows[0]) else "exact"


def _spread(rows: list[Row], column: str, digits: int = 3) -> str:
    """Mean ± standard deviation over seeds."""
    values = [float(row[column]) for row in rows if row[column] != ""]
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def _markdown(title: str, header: Iterable[str], lines: Iterable[Iterable[object]]) -> str:
    head = list(header)
    rows = ["| " + " | ".join(map(str, line)) + " |" for line in lines]
    return "\n".join([title, "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|", *rows])


def _facts(rows: list[Row]) -> str:
    last = rows[-1]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return (
        f"{last['steps']} steps of {last['batch']} rows; {len(rows)} runs; {last['device']}; "
        f"torch {last['torch']}, transformers {last['transformers']}, bitsandbytes "
        f"{last['bitsandbytes']}; commit {commits}."
    )


def _results(finals: dict[str, list[Row]], kind: str) -> str:
    columns: list[tuple[str, Callable[[list[Row]], object]]] = [
        ("target exact", lambda of: _spread(of, "end_test_exact")),
        ("target loss", lambda of: _spread(of, "end_test_loss")),
        ("source exact", lambda of: _spread(of, "end_kept_exact")),
        ("source loss", lambda of: _spread(of, "end_kept_loss", 2)),
        ("change", lambda of: f"{statistics.mean(float(r['change']) for r in of):.2f}"),
        ("its rank", lambda of: f"{statistics.mean(float(r['rank']) for r in of):.1f}"),
        ("lr", lambda of: f"{float(of[0]['lr']):.2g}" + (" (taken)" if of[0]["lr_of"] else "")),
        ("seeds", len),
        ("trained", lambda of: f"{int(of[0]['trained']):,}"),
        ("peak MiB", lambda of: f"{float(of[0]['peak_mib']):.1f}"),
        ("ms a step", lambda of: f"{statistics.mean(float(r['step_ms']) for r in of):.0f}"),
    ]
    if kind == "loss":
        columns = [column for column in columns if not column[0].endswith("exact")]
        columns[1:2] = [
            ("source loss before", lambda of: _spread(of, "start_kept_loss", 3)),
            ("source loss", lambda of: _spread(of, "end_kept_loss", 3)),
            ("right answers", lambda of: _spread(of, "answers")),
        ]
    return _markdown(
        "At the best learning rate, test split, mean ± standard deviation over seeds:",
        ["method", *(title for title, _ in columns)],
        ([name, *(show(of) for _, show in columns)] for name, of in finals.items()),
    )


def _skills(finals: dict[str, list[Row]]) -> str:
    def each(text: str) -> dict[str, float]:
        return {k: float(v) for k, v in (pair.split("=") for pair in text.split(" "))}

    names = list(each(next(iter(finals.values()))[0]["end_kept_each"]))
    lines = []
    for method, of in finals.items():
        found = [each(row["end_kept_each"]) for row in of]
        means = (statistics.mean(one[name] for one in found) for name in names)
        lines.append([method, *(f"{mean:.3f}" for mean in means)])
    start = each(next(iter(finals.values()))[0]["start_kept_each"])
    first = ["(NF4 base, before)", *(f"{start[name]:.3f}" for name in names)]
    return _markdown("Kept of each source skill:", ["method", *names], [first, *lines])


def _sweeps(by_method: dict[str, list[Row]]) -> str:
    swept = {
        name: half
        for name, of in by_method.items()
        if not of[0]["lr_of"] and (half := [row for row in of if is_half_decade(float(row["lr"]))])
    }
    lrs = sorted({on_grid(float(row["lr"])) for of in swept.values() for row in of})
    kind, lines = _kind(next(iter(swept.values()))), []
    for name, of in swept.items():
        at = {on_grid(float(row["lr"])): row for row in of if row["seed"] == "0"}
        cells = (
            f"{float(at[lr][f'end_test_{kind}']):.3f} / {float(at[lr][f'end_kept_{kind}']):.3f}"
            if lr in at
            else ""
            for lr in lrs
        )
        lines.append([name, *cells])
    return _markdown(
        f"The sweep, first seed, target {kind} / source {kind} by learning rate:",
        ["method", *(f"{lr:.2g}" for lr in lrs)],
        lines,
    )


LEVELS = (0.4, 0.6, 0.8)
ABOVE_THE_WORST = (1.02, 1.01, 1.0)


def _frontier(by_method: dict[str, list[Row]], kind: str) -> str:
    """Kept source where the target is the same: per seed, interpolated along the learning rates
    between the first two neighbours of which one is short of the level and one is not."""
    lines, levels = [], LEVELS if kind == "exact" else _loss_levels(by_method)
    for name, of in by_method.items():
        seeds: dict[str, list[Row]] = {}
        for row in of:
            seeds.setdefault(row["seed"], []).append(row)
        cells = []
        for level in levels:
            kept = [k for rows in seeds.values() if (k := _kept_at(rows, level, kind)) is not None]
            spread = f" ± {statistics.stdev(kept):.3f}" if len(kept) > 1 else ""
            cells.append(f"{statistics.mean(kept):.3f}{spread} ({len(kept)})" if kept else "")
        if any(cells):
            lines.append([name, *cells])
    return _markdown(
        f"Source {kind} where target {kind} is the level, interpolated between learning rates "
        "(seeds that have runs on both sides of it):",
        ["method", *map(str, levels)],
        lines,
    )


def _loss_levels(by_method: dict[str, list[Row]]) -> tuple[float, ...]:
    """Target losses that every swept method comes down to, or nearly so."""
    best = (
        statistics.mean(float(row["end_test_loss"]) for row in final_rows(of))
        for of in by_method.values()
        if not of[0]["lr_of"]
    )
    worst = max(best)
    return tuple(round(worst * factor, 3) for factor in ABOVE_THE_WORST)


def _kept_at(rows: list[Row], level: float, kind: str = "exact") -> float | None:
    sign = 1 if kind == "exact" else -1  # a loss falls
    points = sorted(
        (float(r["lr"]), sign * float(r[f"end_test_{kind}"]), float(r[f"end_kept_{kind}"]))
        for r in rows
    )
    level *= sign
    for (_, low, kept), (_, high, less) in itertools.pairwise(points):
        if low < level <= high:
            return kept + (level - low) / (high - low) * (less - kept)
    return None


def _refreshes(finals: dict[str, list[Row]]) -> str:
    return _markdown(
        "Refresh:",
        ["", "refreshes", "churn of each", "retired bytes", "target exact", "source exact"],
        (
            [
                name,
                of[0]["refreshes"],
                _spread(of, "churn"),
                f"{int(of[0]['retired_bytes']):,}",
                _spread(of, "end_test_exact"),
                _spread(of, "end_kept_exact"),
            ]
            for name, of in finals.items()
        ),
    )


def _merges(finals: dict[str, list[Row]], kind: str) -> str:
    lines = []
    for name, of in finals.items():
        cells = [name]
        for prefix in ("end", "original", "quantized"):
            found = [_spread(of, f"{prefix}_test_{kind}")]
            if kind == "exact":
                found.append(_spread(of, f"{prefix}_kept_exact"))
            cells.append(" / ".join(found) if all(found) else "as live")
        lines.append(cells)
    what = "target exact / source exact" if kind == "exact" else "target loss"
    return _markdown(
        f"Merged, {what}:",
        ["method", "live", 'onto="original"', 'onto="quantized"'],
        lines,
    )


def _starts(finals: dict[str, list[Row]]) -> str:
    return _markdown(
        "Before the first step, and after the last:",
        ["method", "source exact at step 0", "source loss at step 0", "target loss at step 0",
         "target exact", "target loss", "source exact"],
        (
            [
                name,
                _spread(of, "start_kept_exact"),
                _spread(of, "start_kept_loss", 4),
                _spread(of, "start_test_loss"),
                _spread(of, "end_test_exact"),
                _spread(of, "end_test_loss"),
                _spread(of, "end_kept_exact"),
            ]
            for name, of in finals.items()
        ),
    )  # fmt: skip


def _means(rows: list[Row], column: str) -> list[float]:
    """Over seeds, by learning rate."""
    at: dict[float, list[float]] = {}
    for row in rows:
        at.setdefault(float(row["lr"]), []).append(float(row[column]))
    return [statistics.mean(at[lr]) for lr in sorted(at)]


def draw(name: str, domain: str, rows: list[Row], out: Path) -> str:
    """Target against kept source: a line per method through its learning rates; a cross where the
    best one ends up over seeds. Returns the picture's markdown."""
    from matplotlib.figure import Figure

    groups = {
        "headline": ["headline"],
        "variants": ["format", "refresh", "budget", "rank", "start", "schedule"],
    }
    links = []
    for title, members in groups.items():
        mine: dict[str, list[Row]] = {}
        for row in rows:
            if row["group"] in members:
                mine.setdefault(row["method"], []).append(row)
        if not mine:
            continue
        kind = _kind(rows)
        figure = Figure(figsize=(8, 5.5), layout="constrained")
        axes = figure.add_subplot()
        for number, (method, of) in enumerate(mine.items()):
            color, style = f"C{number % 10}", ("-", "--", ":")[number // 10 % 3]
            x, y = (_means(of, f"end_{k}_{kind}") for k in ("test", "kept"))
            axes.plot(x, y, style, marker=".", color=color, linewidth=1, label=method)
            best = final_rows(of)
            x, y = ([float(r[f"end_{k}_{kind}"]) for r in best] for k in ("test", "kept"))
            axes.plot(x, y, "x", color=color, markersize=7)
        axes.set_xlabel(f"target, {kind} on the test split")
        axes.set_ylabel(f"source, {kind} kept")
        axes.set_title(f"{name}, {domain}: by learning rate; x: seeds at the best one")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{name}_{domain}_{title}.png"
        figure.savefig(path, dpi=110, metadata={"Software": None})
        links.append(f"![target against kept source, {title}](../results/{path.name})")
    return "\n\n".join(links)
