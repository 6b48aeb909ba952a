"""Several datasets in one table of `leanlift eval`: models side by side, and how far each is from
the base on the same rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from leanlift.cli.eval_rows import Dataset
from leanlift.cli.eval_text import FORMS, SENTENCES, answer_lines, is_mixed, wrapped
from leanlift.evaluation.evaluate import Measured
from leanlift.format import change, count, duration, loss, share, table
from leanlift.paired import Change
from leanlift.paired import change as change_of

BASES = ("base", "base as stored", "model")
"""What others are compared with, the first of these that is measured."""

PAIRED = (
    "Change of loss: from that of {}, over the same rows, ± one standard error, whose unit is a "
    "row, with all turns of its chat, or a window of a text."
)

Models = Sequence[tuple[str, Sequence[Measured]]]
"""Name, and what was measured on each dataset."""


def compared_with(names: Sequence[str]) -> str | None:
    """The model that others are compared with; None: there are no others, or it is not there."""
    return next((name for name in BASES if name in names and len(names) > 1), None)


def datasets_data(
    datasets: Sequence[Dataset], models: Models, judged: Callable[[Dataset], str | None]
) -> list[dict[str, Any]]:
    """A JSON-ready dictionary for each dataset.

    Args:
        datasets: in their order.
        models: in theirs.
        judged: how the answers to a dataset were compared.
    """
    base = compared_with([name for name, _ in models])
    found = []
    for at, dataset in enumerate(datasets):
        first = next((measured[at] for name, measured in models if name == base), None)
        each = []
        for name, measured in models:
            one = measured[at]
            against = None if name == base or first is None else _changes(first, one, dataset)
            each.append(
                {
                    "name": name,
                    **one.evaluation.to_dict(),
                    "seconds": one.seconds,
                    **(against or {"loss_change": None, "exact_match_change": None}),
                }
            )
        found.append(
            {
                "name": dataset.data.name,
                "data": dataset.data.path,
                "is_text": dataset.is_text,
                "rows": len(dataset.samples),
                "units": dataset.units,
                "tokens": sum(sample.trained for sample in dataset.samples),
                "compared": judged(dataset),
                "models": each,
            }
        )
    return found


def _changes(before: Measured, after: Measured, dataset: Dataset) -> dict[str, Any]:
    """Of the loss per token, and of the share that is right, where both were judged; a row, with
    all turns of its chat, is the unit."""
    tokens, rows = [s.trained for s in dataset.samples], [s.row for s in dataset.samples]
    asked = [s.row for s in dataset.asked]
    answers = zip(before.right, after.right, asked, strict=True)
    both = [(float(a), float(b), row) for a, b, row in answers if a is not None and b is not None]
    rights = [list(each) for each in zip(*both, strict=True)] or [[], [], []]
    changes = {
        "loss_change": change_of(before.losses, after.losses, tokens, rows),
        "exact_match_change": change_of(rights[0], rights[1], rows=rights[2]),
    }
    return {key: None if made is None else made.to_dict() for key, made in changes.items()}


def several_text(
    data: dict[str, Any],
    weights: Sequence[str],
    shown: Sequence[dict[str, Any]],
    sentences: bool,
) -> str:
    """The screen of 80 columns; the arguments are those of `eval_text`."""
    what = f"{data['adapter']} over {data['model']}" if data["adapter"] else data["model"]
    names = short_names([each["name"] for each in data["datasets"]])
    lines = [*wrapped(f"{what} on {len(data['datasets'])} datasets:"), ""]
    for each in data["datasets"]:
        text = f"{each['data']}: {_rows(each)}, {count(each['tokens'])} tokens"
        lines += wrapped(text, f"  {names[each['name']]:<{NAME + 2}}", " " * (NAME + 4))
    lines += ["", *_table(data, weights), ""]
    if data["compared_with"]:
        lines += wrapped(PAIRED.format(data["compared_with"]))
    for words in dict.fromkeys(d["compared"] for d in data["datasets"] if d["compared"]):
        lines += wrapped(words)
    if sentences:
        lines += ["", *wrapped(SENTENCES)]
    if is_mixed(weights):
        lines += ["", *wrapped(FORMS)]
    for row in shown:
        lines += ["", f"The first of {row['dataset']} with an answer:", "", *answer_lines(row)]
    return "\n".join(lines)


NAME = 14
"""Columns of a dataset's name."""


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Of each as much as a column has room for: its beginning where that tells it from the others,
    else beginning and end, else its number."""
    cut = [name if len(name) <= NAME else name[: NAME - 1] + "…" for name in names]
    half = (NAME - 1) // 2
    ends = [name if len(name) <= NAME else f"{name[:half]}…{name[-half:]}" for name in names]
    numbered = [
        name if len(name) <= NAME else f"{name[: NAME - 4]}… {number}"
        for number, name in enumerate(names, 1)
    ]
    made = next((each for each in (cut, ends) if len(set(each)) == len(names)), numbered)
    return dict(zip(names, made, strict=True))


def _rows(dataset: dict[str, Any]) -> str:
    """How many, and of what."""
    rows, units = dataset["rows"], dataset["units"]
    if dataset["is_text"]:
        return f"{rows:,} window{'s' * (rows != 1)}"
    of_rows = f"{units:,} row{'s' * (units != 1)}"
    return of_rows if rows == units else f"{rows:,} turns of {of_rows}"


def _table(data: dict[str, Any], weights: Sequence[str]) -> list[str]:
    """A block of lines for each figure, a line for each dataset, a column for each model."""
    names = [model["name"] for model in data["models"]]
    short = short_names([each["name"] for each in data["datasets"]])
    rows: list[list[str]] = [["weights", *(w.replace(" + offsets", " +") for w in weights)]]

    def block(title: str, cell: Callable[[dict[str, Any]], str]) -> None:
        made = [[f"  {short[d['name']]}", *map(cell, d["models"])] for d in data["datasets"]]
        made = [line for line in made if set(line[1:]) != {"–"}]
        if made:
            rows.extend([[title, *("" for _ in names)], *made])

    block("loss", lambda m: loss(m["loss"]))
    if data["compared_with"]:
        block("change of loss", lambda m: _change(m["loss_change"]))
    block("perplexity", lambda m: loss(m["perplexity"]))
    block("exact match", lambda m: share_or_dash(m["exact_match"]))
    rows.append(["time", *(duration(model["seconds"]) for model in data["models"])])
    return table(rows, ["", *names])


def share_or_dash(right: float | None) -> str:
    """A share of answers that are right; "–" where none was judged."""
    return "–" if right is None else share(right)


def _change(given: dict[str, Any] | None) -> str:
    return "–" if given is None else change(**Change(**given).to_dict())
