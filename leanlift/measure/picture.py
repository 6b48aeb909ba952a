"""Stacked bars of bytes by category, with a line per card. Needs matplotlib, which is an extra."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leanlift.errors import UserError
from leanlift.format import size
from leanlift.io.tensors import replacing
from leanlift.measure.meter import CATEGORIES

CARDS = (6, 8, 12, 16, 24, 48)
ENDINGS = (".png", ".svg", ".pdf")


def check_picture(path: str | Path) -> None:
    """Refuse a picture that could not be drawn or written, before anything slow.

    Raises:
        UserError: no such directory, one that may not be written, a file of another kind, or no
            matplotlib.
    """
    path = Path(path).expanduser()
    if path.suffix not in ENDINGS:
        raise UserError(f"{path} is no picture: expected a name that ends in {', '.join(ENDINGS)}.")
    if not path.parent.is_dir():
        raise UserError(f"there is no directory {path.parent} for {path.name}: make it first.")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written: name another place.")
    _figure()


def draw(
    bars: Mapping[str, Mapping[str, int]], path: str | Path, title: str, context: int = 0
) -> None:
    """Draw one horizontal bar per entry of `bars` (name -> bytes by category) into an image, and a
    line for each card that is near their lengths.

    Args:
        bars, path: what to draw, and where.
        title: what is drawn, for which model.
        context: bytes of a card that no tensor can have.

    Raises:
        UserError: as `check_picture`.
    """
    check_picture(path)
    figure = _figure()(figsize=(9, 2.1 + 0.6 * len(bars)), layout="constrained")
    axes = figure.subplots()
    scale, unit = _unit(max(sum(bar.values()) for bar in bars.values()))
    names = [f"{name}: {size(sum(bar.values()))}" for name, bar in bars.items()]
    left = dict.fromkeys(bars, 0.0)
    for number, category in enumerate(CATEGORIES):
        sizes = [bar.get(category, 0) / scale for bar in bars.values()]
        if not any(sizes):
            continue
        axes.barh(names, sizes, left=list(left.values()), color=f"C{number % 10}", label=category)
        left = {name: left[name] + part for name, part in zip(bars, sizes, strict=True)}
    axes.set_title(f"{title}")
    axes.set_xlabel(unit)
    axes.invert_yaxis()
    for card in _cards(max(left.values()) if unit == "GiB" else 0.0, context / scale):
        room = card - context / scale
        axes.axvline(room, color="gray", linestyle="--", linewidth=1)
        axes.annotate(
            f"{card} GB card", (room, 1), xycoords=("data", "axes fraction"), ha="right",
            va="top", rotation=90, fontsize="small", xytext=(-2, -3), textcoords="offset points",
        )  # fmt: skip
    figure.legend(loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    target = Path(path).expanduser()
    with replacing(target) as temporary:
        figure.savefig(temporary, format=target.suffix.removeprefix("."), dpi=150)


def draw_groups(
    lines: Mapping[str, Mapping[str, float]], path: str | Path, title: str, unit: str, shown: str
) -> None:
    """Draw horizontal bars, a group for each card, a colour for each setting.

    Args:
        lines: setting -> card -> what there is; 0: there is none.
        path: the image.
        title: what is drawn, for which model.
        unit: of the bars.
        shown: how a bar's number is formatted.

    Raises:
        UserError: as `check_picture`.
    """
    check_picture(path)
    cards = list(dict.fromkeys(card for line in lines.values() for card in line))
    figure = _figure()(figsize=(9, 1.8 + 0.2 * len(cards) * len(lines)), layout="constrained")
    axes, height = figure.subplots(), 0.8 / len(lines)
    for number, (name, line) in enumerate(lines.items()):
        places = [at + height * (number - (len(lines) - 1) / 2) for at in range(len(cards))]
        lengths = [line.get(card, 0) for card in cards]
        axes.barh(places, lengths, height, color=f"C{number % 10}", label=name)
        for place, length in zip(places, lengths, strict=True):
            axes.annotate(f" {length:{shown}}" if length else " –", (length, place), va="center",
                          fontsize="x-small")  # fmt: skip
    axes.set_yticks(range(len(cards)), cards)
    axes.set_title(title)
    axes.set_xlabel(unit)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    target = Path(path).expanduser()
    with replacing(target) as temporary:
        figure.savefig(temporary, format=target.suffix.removeprefix("."), dpi=150)


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "drawing needs matplotlib: pip install 'leanlift[plots]', or leave the picture out."
        ) from None
    return Figure


def _unit(longest: int) -> tuple[int, str]:
    """The unit in which the longest bar reads well."""
    units = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
    return next((unit for unit in units if longest >= unit[0]), (1, "bytes"))


def _cards(longest: float, context: float) -> list[int]:
    """The cards whose room is of the order of a bar: those that it fills to a third or more, and
    the first one that has room for it."""
    fits = [card for card in CARDS if card - context >= longest]
    short = [card for card in CARDS if card - context < longest and card > longest / 3]
    return [*short, *fits[:1]] if longest else []
