"""`docs/models.md` from results: what becomes of every family, as two tables, and which cards the
larger models need.

python -m benchmarks.models_page
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from pathlib import Path

from benchmarks.common import RESULTS

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
LONGEST = 220
FROZEN = re.compile(
    r"frozen \S+ \([^)]+ weights\): (?:beside the language model|a part that text does not reach) ?"
)
ALL_TRAINED = re.compile(r"Of the weights in the matrices of the blocks: 100\.0% trained [\w, ]*")
HEAD = """# Supported models

What becomes of every causal language model that transformers {transformers} registers, and of
[those that see or hear](#models-that-see-or-hear) (and of
[encoders with decoders](#encoders-with-decoders)), by `benchmarks/families.py`: a tiny random model
of each over NF4, its gradients against torch's own over dense weights, two steps of the trainer and
its loss against the model's own, saved, loaded, merged, and the merge in stock transformers again;
with a plan of it. `benchmarks/models_page.py` makes this page.

All of it is over rows of text.

- **ok**: everything agrees. **note**: likewise, and something is said, which stands in the table.
- **refused**: one sentence, before anything is trained.
- **no model**: what stock transformers makes, loads or trains no tiny model of here.

"""
OTHERS = """
## Models that see or hear

The whole model is saved, and the language model in it trained on rows of text (of a family that has
a class for its text part, that); the merge has every tensor of the checkpoint, and those outside
of the language model as they were. That a note names the frozen part is not shown.

Rows with images are trained on, planned, merged and read by stock transformers in the tests
(`tests/training/test_seeing.py`), with tiny models of Gemma-3, Idefics3, InternVL, LLaVA,
LLaVA-Next, Mistral-3, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5 and SmolVLM; where a processor needs
torchvision, only where that is installed. PaliGemma is trained on rows of text alone: its processor
takes no answer by itself, as TRL gives it.

"""
ENCODERS = """
## Encoders with decoders

What reads with an encoder and writes with a decoder is refused from its config.json, by
`benchmarks/encoder_decoders.py`. Where a kind has a class of its decoder alone, that is in the
first table.

"""
TABLE = """| | families |
|---|---|
{counts}

| family | class | found | trained | said |
|---|---|---|---|---|
"""
WORDS = {"ok": "ok", "note": "ok with a note", "refused": "refused", "no model": "no model",
         "FAILED": "wrong"}  # fmt: skip


def page(
    rows: list[dict[str, str]], others: list[dict[str, str]], encoders: list[dict[str, str]]
) -> str:
    """The whole page, from the rows of the results."""
    head = HEAD.format(transformers=rows[0]["transformers"])
    return head + _table(rows) + OTHERS + _table(others) + ENCODERS + _table(encoders)


def _table(rows: list[dict[str, str]]) -> str:
    found = Counter(_found(row) for row in rows)
    counts = "\n".join(f"| {word} | {found[word]} |" for word in WORDS.values() if found[word])
    lines = [
        f"| {row['family']} | {row['class']} | {_found(row)} | {row['targets']} | {_said(row)} |"
        for row in rows
    ]
    return TABLE.format(counts=counts) + "\n".join(lines) + "\n"


def _found(row: dict[str, str]) -> str:
    """In words; that a part which sees is frozen is no note."""
    return WORDS["ok" if row["found"] == "note" and not _said(row) else row["found"]]


def _said(row: dict[str, str]) -> str:
    """In one cell, without places of this machine."""
    parts = [row["stage"] if row["found"] == "FAILED" else "", row["own_loss"], row["said"]]
    words = " ".join(word for part in parts for word in part.split())
    words = FROZEN.sub("", words)
    words = "" if ALL_TRAINED.fullmatch(words.strip()) else words
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
    tables = page(read("families"), read("families_others"), read("families_encoders"))
    PAGE.write_text(tables + cards_of(read("big_models")), encoding="utf-8")


if __name__ == "__main__":
    main()
