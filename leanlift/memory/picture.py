"""Stacked bars of bytes by category. Needs matplotlib, which is an extra."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from leanlift.checkpoint import replacing
from leanlift.errors import UserError
from leanlift.memory.measure import CATEGORIES


def draw(bars: Mapping[str, Mapping[str, int]], path: str | Path) -> None:
    """Draw one horizontal bar per entry of `bars` (name -> bytes by category) into an image.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "drawing needs matplotlib: pip install 'leanlift[plots]', or leave the picture out."
        ) from None
    figure = Figure(figsize=(9, 1.6 + 0.6 * len(bars)), layout="constrained")
    axes = figure.subplots()
    left = dict.fromkeys(bars, 0.0)
    colors = [f"C{i}" for i in range(10)]
    for category, color in zip(CATEGORIES, colors, strict=True):
        sizes = [bar.get(category, 0) / 2**30 for bar in bars.values()]
        axes.barh(list(bars), sizes, left=list(left.values()), color=color, label=category)
        left = {name: left[name] + size for name, size in zip(bars, sizes, strict=True)}
    axes.set_xlabel("GiB")
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=5, fontsize="small", frameon=False)
    target = Path(path)
    with replacing(target) as temporary:
        figure.savefig(temporary, format=target.suffix.removeprefix(".") or "png", dpi=150)
