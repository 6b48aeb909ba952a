"""Charts as SVG text, from numbers alone: curves, bars, a heat map.

Colours are CSS classes of the page's, so that a chart follows dark and light by itself. A chart is
`WIDTH` units wide, about as many as a phone has pixels, so that its letters stay readable there.
Every text is escaped here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 400, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 30
MOST_POINTS = 400
LOG_FROM = 20.0
Format = Callable[[float], str]
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A curve: its name in the legend, its points (x ascending), its CSS class."""

    name: str
    points: Points
    css: str = "a"


@dataclass(frozen=True)
class Bars:
    """A row of a bar chart: its name, and for each bar a value, a CSS class and a title."""

    name: str
    values: Sequence[tuple[float, str, str]]


def line_chart(
    lines: Sequence[Line],
    title: str,
    shown: Format,
    marks: Sequence[float] = (),
    log_from: float = LOG_FROM,
) -> str:
    """Curves over steps; `marks` are steps with a dashed line.

    Args:
        lines: at least one with at least one point.
        title: for readers that see no picture.
        shown: writes a value of the vertical axis.
        marks: steps to mark.
        log_from: largest over smallest value from which the axis is logarithmic.
    """
    thinned = [Line(line.name, thin(line.points), line.css) for line in lines if line.points]
    xs = [x for line in thinned for x, _ in line.points]
    ys = [y for line in thinned for _, y in line.points]
    logarithmic = min(ys) > 0 and max(ys) / min(ys) > log_from
    across = _scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    low, high = (min(ys), max(ys)) if logarithmic else _padded(min(ys), max(ys))
    rise = _log(math.log10) if logarithmic else _same
    up = _scale(rise(low), rise(high), HEIGHT - BOTTOM, TOP)
    parts = []
    for y in _log_ticks(low, high) if logarithmic else ticks(low, high):
        parts.append(_rule(LEFT, up(rise(y)), WIDTH - RIGHT, up(rise(y)), "grid"))
        parts.append(_text(LEFT - 6, up(rise(y)) + 4, shown(y), "end"))
    for x in ticks(min(xs), max(xs), 4):
        parts.append(_text(across(x), HEIGHT - BOTTOM + 16, f"{x:,.0f}", "middle"))
    parts += [
        _rule(across(x), TOP, across(x), HEIGHT - BOTTOM, "mark")
        for x in marks
        if min(xs) <= x <= max(xs)
    ]
    for line in thinned:
        places = [f"{across(x):.1f},{up(rise(y)):.1f}" for x, y in line.points]
        if len(places) > 1:
            parts.append(f'<polyline class="line {line.css}" points="{" ".join(places)}"/>')
        if len(places) <= 40:
            parts += [
                f'<circle class="dot {line.css}" cx="{across(x):.1f}" cy="{up(rise(y)):.1f}" '
                f'r="2.5">{_title(f"{line.name}, step {x:,.0f}: {shown(y)}")}</circle>'
                for x, y in line.points
            ]
    parts.append(_legend([(line.name, line.css) for line in thinned]) if len(thinned) > 1 else "")
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 4, "step", "end"))
    if logarithmic:
        parts.append(_text(LEFT, HEIGHT - 4, "logarithmic", "start"))
    return _svg(parts, HEIGHT, title)


def column_chart(points: Points, title: str, shown: Format) -> str:
    """A column per step."""
    kept = thin(points, 60)
    high = max(y for _, y in kept) or 1.0
    wide = (WIDTH - LEFT - RIGHT) / len(kept)
    up = _scale(0.0, high * 1.05, HEIGHT - BOTTOM, TOP)
    parts = []
    for y in ticks(0.0, high):
        parts.append(_rule(LEFT, up(y), WIDTH - RIGHT, up(y), "grid"))
        parts.append(_text(LEFT - 6, up(y) + 4, shown(y), "end"))
    every = math.ceil(len(kept) / 6)
    for number, (x, y) in enumerate(kept):
        left = LEFT + number * wide
        thick = min(wide * 0.7, 40)
        parts.append(
            f'<rect class="fill a" x="{left + (wide - thick) / 2:.1f}" y="{up(y):.1f}" '
            f'width="{thick:.1f}" height="{max(0.5, HEIGHT - BOTTOM - up(y)):.1f}">'
            f"{_title(f'step {x:,.0f}: {shown(y)}')}</rect>"
        )
        if number % every == 0:
            parts.append(_text(left + wide / 2, HEIGHT - BOTTOM + 16, f"{x:,.0f}", "middle"))
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 4, "step", "end"))
    return _svg(parts, HEIGHT, title)


def bar_chart(rows: Sequence[Bars], title: str, limit: tuple[float, str] | None = None) -> str:
    """Horizontal bars in groups, the value's text behind each; `limit` is a line across, with its
    name, drawn where it is not far beyond the bars."""
    most = max((value for row in rows for value, _, _ in row.values), default=0.0) or 1.0
    if limit is not None and limit[0] <= 4 * most:
        most = max(most, limit[0])
    left, right = 66, 78
    along = _scale(0.0, most, left, WIDTH - right)
    parts, y = [], 8.0
    for row in rows:
        middle = y + 7 * len(row.values)
        parts.append(_text(left - 6, middle + 4, row.name, "end"))
        for value, css, text in row.values:
            long = max(0.5, along(value) - left)
            parts.append(
                f'<rect class="fill {css}" x="{left}" y="{y:.1f}" width="{long:.1f}" height="11" '
                f'rx="1.5">{_title(f"{row.name}: {text}")}</rect>'
            )
            parts.append(_text(along(value) + 4, y + 9.5, text, "start"))
            y += 14
        y += 8
    if limit is not None and limit[0] <= most:
        parts.append(_rule(along(limit[0]), 2, along(limit[0]), y - 4, "limit"))
        parts.append(_text(along(limit[0]), y + 9, limit[1], "end"))
        y += 14
    return _svg(parts, y, title)


def heat_map(
    rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[float | None]],
    title: str, shown: Format,
) -> str:  # fmt: skip
    """A grid of values from the smallest (pale) to the largest (full); None is left empty.

    Args:
        rows, columns: their names.
        cells: a value for each row and column.
        title: for readers that see no picture.
        shown: writes a value.
    """
    found = [value for row in cells for value in row if value is not None]
    least, most = min(found, default=0.0), max(found, default=0.0)
    left, top, tall = 34, 58, 13
    wide = (WIDTH - left - 40) / len(columns)
    strength = _scale(least, most, 0.1, 1.0)
    parts = []
    for number, name in enumerate(columns):
        x = left + (number + 0.5) * wide
        parts.append(
            f'<text class="tick" transform="translate({x:.1f},{top - 6}) rotate(-28)">'
            f"{escape(name[:16])}</text>"
        )
    for number, (name, values) in enumerate(zip(rows, cells, strict=True)):
        y = top + number * tall
        if len(rows) <= 16 or number % 4 == 0:
            parts.append(_text(left - 5, y + 10, name, "end"))
        for at, value in enumerate(values):
            if value is None:
                continue
            parts.append(
                f'<rect class="fill heat" x="{left + at * wide:.1f}" y="{y}" '
                f'width="{wide - 1:.1f}" height="{tall - 1}" '
                f'fill-opacity="{strength(value):.3f}">'
                f"{_title(f'{name}, {columns[at]}: {shown(value)}')}</rect>"
            )
    return _svg(parts, top + tall * len(rows) + 4, title)


def thin(points: Points, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of as many of them."""
    if len(points) <= most:
        return list(points)
    ends = [len(points) * i // most for i in range(most + 1)]
    groups = [points[a:b] for a, b in itertools.pairwise(ends)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]


SMALLEST = 1e-300
"""A step of an axis: smaller ones are lost to rounding, or are 0."""


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about as many as are wanted; `low` alone where nothing
    lies between them that has a step of its own."""
    span = high - low
    if not SMALLEST * wanted < span < math.inf:
        return [low]
    step = 10 ** math.floor(math.log10(span / wanted))
    factor = next((f for f in (1, 2, 5, 10) if span / (f * step) <= wanted), 10)
    step *= factor
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / 5))
    return [10.0**e for e in range(first, last + 1, every) if low <= 10.0**e <= high] or [low]


def _padded(low: float, high: float) -> tuple[float, float]:
    """A range with some air, down to 0 where that is near."""
    span = high - low or abs(high) or 1.0
    padded = 0.0 if 0 <= low < span else low - 0.05 * span
    return padded, high + 0.05 * span


def _scale(low: float, high: float, begin: float, end: float) -> Callable[[float], float]:
    span = high - low
    return lambda value: begin + (end - begin) * ((value - low) / span if span else 0.5)


def _same(value: float) -> float:
    return value


def _log(function: Callable[[float], float]) -> Callable[[float], float]:
    return lambda value: function(max(value, 1e-300))


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return (
        f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _rule(x: float, y: float, to_x: float, to_y: float, css: str) -> str:
    return f'<line class="{css}" x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}"/>'


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def _legend(names: Sequence[tuple[str, str]]) -> str:
    parts, y = [], TOP + 8
    for name, css in names:
        parts.append(
            f'<rect class="fill {css}" x="{WIDTH - RIGHT - 10}" y="{y - 8}" width="9" height="9"/>'
        )
        parts.append(_text(WIDTH - RIGHT - 15, y, name, "end"))
        y += 15
    return "".join(parts)


def _svg(parts: Sequence[str], height: float, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
        + "".join(parts)
        + "</svg>"
    )
