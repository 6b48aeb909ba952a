"""A run's report as one self-contained page: no script, no request, dark and light.

Every word from a file goes through the template, which escapes it, or through `svg`, which does.
A policy in the page itself forbids scripts and requests, should a word ever get past both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from leanlift.errors import UserError
from leanlift.format import change, count, duration, loss, share, size
from leanlift.format.names import short_name
from leanlift.io.files import replacing
from leanlift.io.measured import categories_compared, difference, phases_compared
from leanlift.report.adapter import AdapterFacts
from leanlift.report.data import Answers, Curve, Run
from leanlift.report.maps import grid_of, mean_of, share_of
from leanlift.report.svg import Bars, Line, bar_chart, column_chart, heat_map, line_chart
from leanlift.report.text import chosen_words, format_words, refresh_words, units

PAGE_NAME = "report.html"
MADE_BY = '<meta name="generator" content="leanlift report">'
MOST_CHANGES, MOST_ANSWERS = 12, 12


@dataclass(frozen=True)
class Figure:
    """A number at the top of the page."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """A card of the page."""

    title: str
    text: str
    svg: Markup


def write_page(run: Run, file: str | Path | None = None) -> Path:
    """Write the page of a run; returns where it is.

    Args:
        run: as read.
        file: by default `report.html` in the run's directory; a page that leanlift wrote is
            replaced, nothing else is.

    Raises:
        UserError: something else stands there.
    """
    path = run.directory / PAGE_NAME if file is None else Path(file).expanduser()
    if path.is_dir():
        path = path / PAGE_NAME
    check_place(path)
    html = page(run).encode("utf-8", "replace")  # a file's text may be half a character
    with replacing(path) as temporary:
        temporary.write_bytes(html)
    return path


def check_place(path: Path) -> None:
    """Refuse to overwrite what is no page of ours, and to make directories.

    Raises:
        UserError: it would.
    """
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} does not exist: name a file in a directory that does.")
    if not path.exists():
        return
    if not path.is_file():
        raise UserError(f"{path} is no file that could be replaced: name another one.")
    with path.open("rb") as opened:
        begin = opened.read(1000).decode("utf-8", "replace")
    if MADE_BY not in begin:
        raise UserError(f"{path} exists and is no page of leanlift report: name another file.")


def page(run: Run) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["units"] = units
    return environment.get_template("page.html.jinja").render(
        name=run.name,
        about=_about(run),
        figures=_figures(run),
        charts=_charts(run),
        changes=[] if run.adapter is None else _changes(run.adapter),
        kept=_kept(run),
        answers=_shown(run.answers),
        answers_text=_answers_text(run.answers),
        settings=run.settings,
        versions=_versions(run),
        notes=[*(run.memory or {}).get("notes", []), *run.missing],
    )


def _about(run: Run) -> str:
    adapter = run.adapter
    if adapter is None:
        return str(run.directory)
    return (
        f"{short_name(adapter.base)}, held in {format_words(adapter.formats)}. Of "
        f"{len(adapter.matrices)} matrices, {share(adapter.entries, adapter.weights)} of the "
        f"entries are trained ({chosen_words(adapter.selector)}); the rest stays as it is."
    )


def _versions(run: Run) -> str:
    """Versions that the run was made with, as one line; of older runs, leanlift's alone."""
    found = dict((run.memory or {}).get("versions") or {})
    if not found and "leanlift_version" in run.settings:
        found = {"leanlift": run.settings["leanlift_version"]}
    return ", ".join(f"{name} {version}" for name, version in list(found.items())[:20])


def _figures(run: Run) -> list[Figure]:
    figures = []
    if run.curve is not None and run.curve.loss:
        points = run.curve.loss
        steps = f"in {count(run.curve.steps)} steps"
        figures.append(Figure("Loss", f"{loss(points[0][1])} → {loss(points[-1][1])}", steps))
    if run.curve is not None and run.curve.eval_loss:
        points = run.curve.eval_loss
        times = f"measured {len(points)} times" if len(points) > 1 else "measured once"
        figures.append(
            Figure("Evaluation loss", f"{loss(points[0][1])} → {loss(points[-1][1])}", times)
        )
    if run.kept:
        first = run.kept[0]
        value = change(first.change, first.error)
        figures.append(Figure("Change of what was kept", value, f"loss on {first.name}"))
    if run.memory is not None:
        figures += _memory_figures(run.memory)
    if run.adapter is not None:
        kept = f"{count(run.adapter.retired)} more are retired: offset kept, no longer trained"
        note = kept if run.adapter.retired else share(run.adapter.entries, run.adapter.weights)
        figures.append(Figure("Trained entries", count(run.adapter.entries), note))
    return figures


def _memory_figures(memory: dict[str, Any]) -> list[Figure]:
    figures = []
    rows = categories_compared(memory)
    if rows:
        peak = rows[-1]
        note = "" if peak.off is None else f"planned {size(peak.planned)}, {difference(peak)}"
        figures.append(Figure("Peak of training", size(peak.measured), note))
    if "train" in memory["phases"]:
        seconds = memory["phases"]["train"]["seconds"]
        figures.append(Figure("Training time", duration(seconds), f"on {memory['device'][:60]}"))
    return figures


def _charts(run: Run) -> list[Chart]:
    charts = [] if run.curve is None else _curves(run.curve)
    if run.memory is not None:
        charts += _memory(run.memory)
    if run.adapter is not None:
        charts += _maps(run.adapter)
    return charts


def _curves(curve: Curve) -> list[Chart]:
    charts = []
    marks = [refresh.step for refresh in curve.refreshes]
    lines = [Line("training", curve.loss, "a"), Line("evaluation", curve.eval_loss, "b")]
    lines = [line for line in lines if line.points]
    if lines:
        text = "Mean cross-entropy per trained token: lower is better."
        if marks:
            text += " Dashed: a refresh chose the trained entries anew."
        charts.append(Chart("Loss", text, Markup(line_chart(lines, "Loss", loss, marks))))
    if curve.learning_rate:
        rates = [Line("learning rate", curve.learning_rate, "a")]
        svg = line_chart(rates, "Learning rate", "{:.3g}".format, log_from=math.inf)
        charts.append(Chart("Learning rate", "As the schedule had it.", Markup(svg)))
    if curve.refreshes:
        points = [(float(refresh.step), refresh.churn) for refresh in curve.refreshes]
        svg = column_chart(points, "Trained entries exchanged by each refresh", share)
        text = f"Refreshes of the mask: {refresh_words(curve)}"
        charts.append(Chart("Refreshes", text, Markup(svg)))
    return charts


def _memory(memory: dict[str, Any]) -> list[Chart]:
    charts = []
    capacity = memory.get("capacity")
    where = "this machine" if memory["device"] == "cpu" else memory["device"][:30]
    limit = None if not capacity else (float(capacity), f"{where}: {size(capacity)}")
    phases = phases_compared(memory)
    if phases:
        rows = [Bars(row.name[:10], _pair(row.measured, row.planned)) for row in phases]
        text = "Peak of each part of the run; grey: as planned."
        if limit is not None:
            text += f" {where[0].upper()}{where[1:]} has {size(capacity)}."
        svg = bar_chart(rows, "Memory by phase", limit)
        charts.append(Chart("Memory by phase", text, Markup(svg)))
    parts = categories_compared(memory)[:-1]
    if parts:
        rows = [Bars(_short(row.name), _pair(row.measured, row.planned)) for row in parts]
        text = "What the peak of training was made of; grey: as planned."
        svg = bar_chart(rows, "Memory at the peak of training")
        charts.append(Chart("Memory at the peak", text, Markup(svg)))
    return charts


def _pair(measured: int, planned: int | None) -> list[tuple[float, str, str]]:
    bars = [(float(measured), "a", size(measured))]
    return bars if planned is None else [*bars, (float(planned), "plan", size(planned))]


def _short(category: str) -> str:
    """A category in the room before its bar."""
    words = {
        "embeddings and head": "ends",
        "norms and other": "other",
        "base weights": "base",
        "retired entries": "retired",
        "optimizer state": "optimizer",
        "activations and workspace": "activations",
    }
    return words.get(category, category[:11])


def _maps(adapter: AdapterFacts) -> list[Chart]:
    """Shares and changes by layer and kind of matrix; shares that are all alike need no picture."""
    grid = grid_of(adapter)
    if not grid.kinds:
        return []
    shares, changes = grid.values(share_of), grid.values(mean_of)
    low, high = _range(shares)
    charts, title = [], "Where the trained entries lie"
    by = "by layer (down) and kind of matrix"
    if high - low < 0.02 * high:
        alike = f"The same share of every matrix is trained, {share(high)}. "
        title = f"{title}, and how far they moved"
    else:
        alike = ""
        text = f"Trained share of each matrix, {by}: from {share(low)} (pale) to {share(high)}."
        svg = heat_map(grid.layers, grid.kinds, shares, "Trained share", share)
        charts.append(Chart(title, text, Markup(svg)))
        title = "How far they moved"
    low, high = _range(changes)
    text = (
        f"{alike}Mean absolute change of trained and retired entries, {by}: from {loss(low)} "
        f"(pale) to {loss(high)}."
    )
    svg = heat_map(grid.layers, grid.kinds, changes, "Mean change", loss)
    return [*charts, Chart(title, text, Markup(svg))]


def _range(cells: list[list[float | None]]) -> tuple[float, float]:
    found = [value for row in cells for value in row if value is not None]
    return min(found), max(found)


def _kept(run: Run) -> list[list[str]]:
    """Rows that were to be kept, as lines of a table."""
    return [
        [
            kept.name,
            count(kept.rows),
            count(kept.tokens),
            loss(kept.before),
            loss(kept.after),
            change(kept.change, kept.error),
        ]
        for kept in run.kept
    ]


def _changes(adapter: AdapterFacts) -> list[list[str]]:
    moved = sorted(adapter.matrices, key=lambda matrix: -matrix.norm)[:MOST_CHANGES]
    return [
        [
            matrix.module,
            share(matrix.density),
            loss(matrix.mean),
            loss(matrix.largest),
            "–" if matrix.at is None else f"{matrix.at[0]:,}, {matrix.at[1]:,}",
        ]
        for matrix in moved
    ]


def _shown(answers: list[Answers]) -> list[Answers]:
    """The rows on which models differ before the others."""
    return sorted(answers, key=lambda row: len(set(row.answers.values())) < 2)[:MOST_ANSWERS]


def _answers_text(answers: list[Answers]) -> str:
    """How many answers of each model were right, of all that the file has."""
    parts = []
    for name in dict.fromkeys(name for row in answers for name in row.answers):
        judged = [row.right[name] for row in answers if row.right.get(name) is not None]
        if judged:
            parts.append(f"{name}: {sum(map(bool, judged))} of {len(judged)} right")
    shown = "rows on which the models differ come first"
    return f"{'; '.join(parts)}. {shown[0].upper()}{shown[1:]}." if parts else shown + "."
