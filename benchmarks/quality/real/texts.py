"""What is taught and what is asked: token ids, and from where on they count.

Taught are worked problems from the user's file, in the form in which `leanlift train` would have
them. Asked are held-out ones; three kinds of text that these do not teach, which stand in
`samples/`; and the probes.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from benchmarks.quality.real.probes import probes
from leanlift.data.dataset import load_rows
from leanlift.evaluation.evaluate import to_samples

SAMPLES = Path(__file__).parents[1] / "samples"
SOURCES = ("prose", "code", "chat")


@dataclass(frozen=True)
class TokenRow:
    """Token ids, of which those from `start` on count."""

    ids: list[int]
    start: int

    @property
    def counted(self) -> int:
        return len(self.ids) - self.start


@dataclass(frozen=True)
class Lengths:
    """How much of everything.

    Attributes:
        longest: tokens of a row that is taught or asked; of the samples' texts, where they are cut.
        valid, test: rows of the target, each.
        source: texts of each kind.
        probes: of each kind.
    """

    longest: int = 160
    valid: int = 48
    test: int = 96
    source: int = 32
    probes: int = 16


@dataclass(frozen=True)
class Texts:
    """Rows to train on, and sets to ask, by name: valid, test, those of SOURCES, probes."""

    train: list[TokenRow]
    asked: dict[str, list[TokenRow]]


def texts(tokenizer: Any, data: Path, lengths: Lengths) -> Texts:
    """Everything, the same each time.

    Args:
        tokenizer: of the base.
        data: rows of worked problems, in any form that `leanlift train` takes.
        lengths: how much.
    """
    rows = [dict(row) for row in load_rows(str(data))]
    for row in rows:  # MATH-10K's answers begin with what its prompts end with
        if isinstance(row.get("output"), str):
            row["output"] = row["output"].strip().removeprefix("A:").strip()
    found = [row for row in _samples(rows, tokenizer) if len(row.ids) <= lengths.longest]
    random.Random(0).shuffle(found)
    held_out = lengths.valid + lengths.test
    if len(found) < 2 * held_out:
        raise SystemExit(
            f"{data} has {len(found)} rows of at most {lengths.longest} tokens; expected at least "
            f"{2 * held_out}, of which {held_out} are held out."
        )
    test, valid, train = (
        found[: lengths.test],
        found[lengths.test : held_out],
        found[held_out:],
    )
    asked = {"valid": valid, "test": test}
    for name in SOURCES:
        asked[name] = _source(name, tokenizer, lengths)
    asked["probes"] = [TokenRow(*_continued(tokenizer, *one)) for one in probes(lengths.probes)]
    return Texts(train, asked)


def _samples(rows: list[dict[str, Any]], tokenizer: Any) -> list[TokenRow]:
    """As `leanlift train` tokenizes them."""
    return [TokenRow(s.whole, s.start) for s in to_samples(Dataset.from_list(rows), tokenizer)]


def _source(name: str, tokenizer: Any, lengths: Lengths) -> list[TokenRow]:
    if name == "chat":
        rows = _samples([dict(r) for r in load_rows(str(SAMPLES / "chat.jsonl"))], tokenizer)
    else:
        whole = (SAMPLES / f"{name}.txt").read_text(encoding="utf-8")
        rows = [
            TokenRow(tokenizer(text.strip())["input_ids"], 1) for text in whole.split("\n***\n")
        ]
    cut = [TokenRow(row.ids[: lengths.longest], row.start) for row in rows]
    return [row for row in cut if row.counted > 0][: lengths.source]


def _continued(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], int]:
    """Token ids of both, and where they part from those of the prompt alone."""
    whole, given = tokenizer(prompt + answer)["input_ids"], tokenizer(prompt)["input_ids"]
    ends = {tokenizer.eos_token_id}
    while whole and whole[-1] in ends:
        whole = whole[:-1]
    start = next((i for i, (a, b) in enumerate(zip(whole, given, strict=False)) if a != b), None)
    return whole, min(len(given), len(whole) - 1) if start is None else start


def counted(rows: Iterable[TokenRow]) -> int:
    """Tokens that count in the loss."""
    return sum(row.counted for row in rows)
