"""What `leanlift eval` prints: a table of models, what was compared, a few answers."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from leanlift.format import count, duration, loss, share, table

WIDTH, LABEL = 80, 18
LONGEST = 190
"""Characters of a text that are shown, its end among them: that is where an answer stands."""

FORMS = (
    "A base in NF4 or INT8 is rounded, so its loss is not that of the base as stored: compare rows "
    "of one form. A model merged onto the original weights is without that rounding again; one "
    "merged onto the quantized weights keeps it, as it was trained."
)
MORE = "Beside it: --base measures the base without the adapter, --merged DIR a merged model."
SENTENCES = (
    "The expected answers are sentences, which hardly any greedy text repeats word for word: go by "
    "the loss, or compare less with --judge number, letter, label or contains."
)


def eval_text(
    data: dict[str, Any],
    weights: Sequence[str],
    shown: Sequence[dict[str, Any]],
    asked: int,
    sentences: bool,
) -> str:
    """The screen of 80 columns.

    Args:
        data: what `--json` prints.
        weights: the form of each model's weights, for the table.
        shown: the first rows with answers, as `--predictions` has them.
        asked: of how many.
        sentences: whether whole sentences were compared.
    """
    models = data["models"]
    rows, tokens = data["rows"], count(data["tokens"])
    what = f"{data['adapter']} over {data['model']}" if data["adapter"] else data["model"]
    each, counted = ("window", "tokens") if data["is_text"] else ("row", "trained tokens")
    how_many = f"{rows:,} {each}{'s' * (rows != 1)}, {tokens} {counted}"
    lines = wrapped(f"{what} on {data['data']}: {how_many}.")
    lines += ["", *_table(models, weights), ""]
    if len(models) == 1 and data["adapter"]:
        lines += wrapped(MORE)
    if data["compared"]:
        lines += wrapped(data["compared"])
    if sentences:
        lines += ["", *wrapped(SENTENCES)]
    if is_mixed(weights):
        lines += ["", *wrapped(FORMS)]
    if shown:
        first = "first" if len(shown) == 1 else f"first {len(shown)}"
        lines += ["", f"The {first} of {asked:,} rows with an answer:"]
    for row in shown:
        lines += ["", *answer_lines(row)]
    return "\n".join(lines)


def is_mixed(weights: Sequence[str]) -> bool:
    """Whether models hold their weights in more forms than one."""
    return len({form.partition(" + ")[0] for form in weights}) > 1


def _table(models: Sequence[dict[str, Any]], weights: Sequence[str]) -> list[str]:
    cells = []
    for model, form in zip(models, weights, strict=True):
        right = "–"
        if model["exact_match"] is not None:
            right = f"{share(model['exact_match'])} of {model['judged']:,}"
        cells.append(
            [
                model["name"],
                form,
                loss(model["loss"]),
                loss(model["perplexity"]),
                right,
                duration(model["seconds"]),
            ]
        )
    head = ["model", "weights", "loss", "perplexity", "exact match", "time"]
    return table(cells, head, left=2)


def answer_lines(row: dict[str, Any]) -> list[str]:
    """What was asked, what was expected, and what each model said."""
    expected = row["expected"]
    if "answer" in row:
        expected = f"{_cut(expected)} (answer: {row['answer']})" if expected else row["answer"]
    lines = [*_part("prompt", row["prompt"]), *_part("expected", expected)]
    marks = {True: "✓ ", False: "✗ ", None: ""}
    for name, text in row["answers"].items():
        lines += _part(name, marks[row["right"][name]] + (_cut(text) or "(nothing)"))
    return lines


def _part(label: str, text: str) -> list[str]:
    return wrapped(_cut(text), f"  {label[: LABEL - 3]:<{LABEL - 2}}", " " * LABEL)


def _cut(text: str) -> str:
    """One line of printable characters, its middle left out where it is long."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(line) <= LONGEST:
        return line
    half = LONGEST // 2
    return f"{line[:half].rstrip()} … {line[-half:].lstrip()}"


def wrapped(text: str, first: str = "", later: str = "") -> list[str]:
    """Lines of the screen's width."""
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=later, break_on_hyphens=False
    )
