"""`docs/models.md` from results: what becomes of every family, and which cards large models need.

python -m benchmarks.models_page
"""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

from benchmarks.common import RESULTS

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
LONGEST = 220
HEAD = """# Supported models

What becomes of every causal language model that transformers {transformers} registers, by
`benchmarks/families.py`: a tiny random model of each over NF4, its gradients against torch's own
over dense weights, two steps of the trainer and its loss against the model's own, saved, loaded,
merged, and the merge in stock transformers again; with a plan of it. `benchmarks/models_page.py`
makes this page.

| | families |
|---|---|
{counts}

- **ok**: everything agrees. **note**: likewise, and something is said, which stands in the table.
- **refused**: one sentence, before anything is trained.
- **no model**: what stock transformers makes, loads or trains no tiny model of here.

| family | class | found | trained | said |
|---|---|---|---|---|
"""
WORDS = {"ok": "ok", "note": "ok with a note", "refused": "refused", "no model": "no model",
         "FAILED": "wrong"}  # fmt: skip


def page(rows: list[dict[str, str]]) -> str:
    """The whole page, from the rows of the results."""
    found = Counter(row["found"] for row in rows)
    counts = "\n".join(f"| {word} | {found[key]} |" for key, word in WORDS.items() if found[key])
    lines = [
        f"| {row['family']} | {row['class']} | {WORDS[row['found']]} | {row['targets']} "
        f"| {_said(row)} |"
        for row in rows
    ]
    return (
        HEAD.format(transformers=rows[0]["transformers"], counts=counts) + "\n".join(lines) + "\n"
    )


def _said(row: dict[str, str]) -> str:
    """In one cell, without places of this machine."""
    parts = [row["stage"] if row["found"] == "FAILED" else "", row["own_loss"], row["said"]]
    words = " ".join(word for part in parts for word in part.split())
    words = " ".join("its checkpoint" if "/tmp" in word else word for word in words.split())
    words = words.replace("|", "\\|")
    return words if len(words) <= LONGEST else words[:LONGEST].rsplit(" ", 1)[0] + " …"


CARDS_HEAD = """
## Cards for the larger ones

What `leanlift plan` says, and for smaller cards `leanlift plan --fit`, from the configurations that
these are published with, by `benchmarks/big_models.py`: NF4 with double quantization, experts too,
5 % of every matrix, 1 × 2048 tokens. *yes*: as it is; *changed*: with what is below the table.

| model | weights, 10⁹ | trained, 10⁹ | base, GiB | needs, GiB | {cards} |
|---|---|---|---|---|{rules}|
"""


def cards_of(rows: list[dict[str, str]]) -> str:
    """The section on large models, from the rows of their results."""
    cards = [key for key in rows[0] if key.endswith(" GB")]
    head = CARDS_HEAD.format(cards=" | ".join(cards), rules="|".join("---" for _ in cards))
    lines, changes = [], []
    for row in rows:
        words = [CARD_WORDS.get(row[card], "changed") for card in cards]
        facts = [row[key] for key in ("weights, 1e9", "trained, 1e9", "base GiB", "needed GiB")]
        lines.append("| " + " | ".join([row["model"], *facts, *words]) + " |")
        changes += [
            f"- {row['model']} on {card}: `{row[card]}`"
            for card, word in zip(cards, words, strict=True)
            if word == "changed"
        ]
    return head + "\n".join(lines) + "\n\n" + "\n".join(changes) + "\n"


CARD_WORDS = {"as it is": "yes", "no": "no"}


def read(name: str) -> list[dict[str, str]]:
    """The rows of a result."""
    with (RESULTS / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main() -> None:
    text = page(read("families")) + cards_of(read("big_models"))
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
