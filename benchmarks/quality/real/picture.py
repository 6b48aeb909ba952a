"""A picture of each budget: what is learned against what is forgotten."""

from __future__ import annotations

from pathlib import Path

from benchmarks.quality.real.table import Results


def draw(name: str, results: Results, out: Path) -> list[str]:
    """One picture per budget and group: a line per method from the base through its learning
    rates, a ring at the reported one. Returns their markdown."""
    from matplotlib.figure import Figure

    links = []
    for density, lines in results.lines.items():
        for group in dict.fromkeys(line.rows[0]["group"] for line in lines.values()):
            shown = [line for line in lines.values() if line.rows[0]["group"] == group]
            figure = Figure(figsize=(8, 5.5), layout="constrained")
            axes = figure.add_subplot()
            for number, line in enumerate(shown):
                upto = slice(0, line.curve.best + 2)
                x = line.measured.target[0, upto].tolist()
                y = line.measured.increase[0, upto].tolist()
                style, color = ("-", "--")[number // 10 % 2], f"C{number % 10}"
                axes.plot(x, y, style, marker=".", color=color, linewidth=1, label=line.name)
                best = line.curve.best
                axes.plot(x[best], y[best], "o", color=color, fillstyle="none", markersize=9)
            axes.set_xlabel("target: loss of the test rows, nats a token (left is better)")
            axes.set_ylabel("source: rise of its loss (lower is better)")
            axes.set_title(f"{name}, {float(density):.1%}: by learning rate; ring: the best one")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
            out.mkdir(parents=True, exist_ok=True)
            path = out / f"{name}_{density}_{group}.png"
            figure.savefig(path, dpi=110, metadata={"Software": None})
            links.append(f"![learned and forgotten, {group}](../../results/{path.name})")
    return links
