"""The tables of docs/cards.md and docs/memory.md from results; a test holds the pages to them.

python -m benchmarks.pages
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.common import RESULTS, read_rows
from benchmarks.recipes import NAMES

DOCS = Path(__file__).parent.parent / "docs"
Rows = list[dict[str, str]]

SHORT = {
    "tiled_mlp": "tiled MLP",
    "quantize_embeddings": "INT8 ends",
    "embedding_on_cpu": "embedding on CPU",
    "activation_offloading": "offload",
    "stream_base": "stream",
    "stream_state": "stream state",
    "optim_in_backward": "in backward",
}
"""Settings as a cell names them; docs/cards.md explains each."""


ORDER = list(NAMES)


def by_card(rows: Rows) -> str:
    """The results of `benchmarks.recipes`: a cell for each model and card; smaller models first."""
    rows = sorted(rows, key=lambda row: ORDER.index(row["model"]))
    cards = sorted({row["card GB"] for row in rows}, key=int)
    lines = ["| | " + " | ".join(f"{card} GB" for card in cards) + " |", _rule(len(cards) + 1)]
    for model in dict.fromkeys(row["model"] for row in rows):
        planned = {row["card GB"]: _cell(row) for row in rows if row["model"] == model}
        cells = [planned.get(card, "–") for card in cards]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, str]) -> str:
    if row["fits"] != "True":
        return "no"
    words = [each.partition("=") for each in row["to fit"].split(", ") if each]
    short = [SHORT[key] for key, _, _ in words if key in SHORT]
    short += [f"{float(value):.1%}" for key, _, value in words if key == "density"]
    how = ", ".join(short) or "as it is"
    return f"{row['needed GiB']} GiB, {float(row['seconds a step']):g} s: {how}"


EXAMPLE = "Llama-3-8B"
PARTS = {
    "base weights": "base, NF4 with double quantization",
    "embeddings and head": "embedding and head",
    "index": "index",
    "values": "values, bf16",
    "gradients": "gradients",
    "optimizer state": "moments, 8 bits",
    "streamed state": "of two blocks: index, values, moments",
    "scratch": "scratch",
    "activations and workspace": "activations and workspace",
}


def of_one_model(rows: Rows) -> str:
    """The results of `benchmarks.plan` for one model: a line for each part, a column for each
    setting; and what it takes of the host's memory."""
    rows = [row for row in rows if row["model"] == EXAMPLE]
    names = [row["setting"].replace("_", " ") for row in rows]
    lines = ["| | " + " | ".join(names) + " |", _rule(len(names) + 1)]
    for key, words in PARTS.items():
        lines.append(f"| {words} | " + " | ".join(row[f"{key} GiB"] for row in rows) + " |")
    lines.append("| **peak** | " + " | ".join(f"**{row['peak GiB']}**" for row in rows) + " |")
    lines.append("| of the host's memory | " + " | ".join(row["host GiB"] for row in rows) + " |")
    return "\n".join(lines)


def _rule(columns: int) -> str:
    return "|---" * columns + "|"


TABLES: dict[str, tuple[str, Callable[[Rows], str]]] = {
    "cards.md": ("recipes", by_card),
    "memory.md": ("plan", of_one_model),
}
"""Pages: the result that each shows, and how."""


def page(name: str) -> str:
    """A page with the table of its result between its marks.

    Raises:
        ValueError: the page has no marks.
    """
    result, table = TABLES[name]
    text = (DOCS / name).read_text(encoding="utf-8")
    begin, end = (f"<!-- {result}.csv: {word} -->" for word in ("begin", "end"))
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"expected {begin} and {end} in docs/{name}")
    return f"{before}{begin}\n\n{table(read_rows(RESULTS / f'{result}.csv'))}\n\n{end}{after}"


def main() -> None:
    for name in TABLES:
        (DOCS / name).write_text(page(name), encoding="utf-8")


if __name__ == "__main__":
    main()
