"""`docs/models.md` from `results/families.csv`: what becomes of every family, as a table.

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


def main() -> None:
    with (RESULTS / "families.csv").open(newline="", encoding="utf-8") as file:
        PAGE.write_text(page(list(csv.DictReader(file))), encoding="utf-8")


if __name__ == "__main__":
    main()
