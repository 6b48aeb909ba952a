"""Domain (a): generated skills with exact answers.

A row is a skill's letter, a text, "=" and the answer, one token per character: "Rhxqzb=bzqxh".
The source has six skills on strings and digits. Of the three target skills, S (reverse, then the
next letter) builds on R and N, D (a number less two) is kin to A (plus one), and W (swap
neighbours) is new. The text alone decides which split it belongs to.
"""

from __future__ import annotations

import random
import string
import zlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.quality.domain import Domain, Rows

LETTERS, DIGITS = string.ascii_lowercase, string.digits
CHARACTERS = LETTERS + DIGITS + string.ascii_uppercase + "="
IDS = {character: number for number, character in enumerate(CHARACTERS, start=2)}
END = 1
FEWEST, MOST = 4, 6
SPLITS = 10  # of ten texts, one is for validation and one for the test


def _letters(rng: random.Random) -> str:
    return "".join(rng.choices(LETTERS, k=rng.randint(FEWEST, MOST)))


def _digits(rng: random.Random) -> str:
    return "".join(rng.choices(DIGITS, k=rng.randint(FEWEST, MOST)))


def _next(text: str) -> str:
    return "".join(LETTERS[(LETTERS.index(c) + 1) % 26] for c in text)


def _plus(step: int) -> Callable[[str], str]:
    """Add `step` to a number, its length kept: 0999 -> 1000, 9999 -> 0000."""
    return lambda text: str((int(text) + step) % 10 ** len(text)).zfill(len(text))


def _swap(text: str) -> str:
    return "".join(text[i : i + 2][::-1] for i in range(0, len(text), 2))


Skill = tuple[Callable[[random.Random], str], Callable[[str], str]]

SOURCE: dict[str, Skill] = {
    "Copy": (_letters, lambda text: text),
    "Reverse": (_letters, lambda text: text[::-1]),
    "Turn": (_letters, lambda text: text[1:] + text[:1]),
    "Next": (_letters, _next),
    "Add": (_digits, _plus(1)),
    "Mirror": (_digits, lambda text: "".join(str(9 - int(c)) for c in text)),
}
TARGET: dict[str, Skill] = {
    "Shift": (_letters, lambda text: _next(text[::-1])),
    "Difference": (_digits, _plus(-2)),
    "Wrap": (_letters, _swap),
}


def split_of(text: str) -> str:
    """train, valid or test; no text is in two of them."""
    share = zlib.crc32(text.encode()) % SPLITS
    return ("test", "valid")[share] if share < 2 else "train"


def encode(text: str) -> list[int]:
    return [IDS[character] for character in text]


def make_rows(name: str, skill: Skill, count: int, split: str, seed: int = 0) -> list[tuple]:
    """`count` different rows as (prompt ids, completion ids)."""
    draw, rule = skill
    rng, found = random.Random(f"{name}/{split}/{seed}"), dict[str, str]()
    while len(found) < count:
        text = draw(rng)
        if split_of(text) == split:
            found.setdefault(text, rule(text))
    return [(encode(f"{name[0]}{t}="), [*encode(answer), END]) for t, answer in found.items()]


def skills(train: int, test: int, batch: int) -> Domain:
    """The domain.

    Args:
        train: rows per target skill.
        test: rows per skill, for validation, test and each source skill.
        batch: rows of a pretraining batch.
    """

    def target(count: int, split: str) -> Rows:
        return Rows.of([r for n, s in TARGET.items() for r in make_rows(n, s, count, split)])

    def pretraining(seed: int) -> Iterator[dict[str, Tensor]]:
        pool = Rows.of([r for n, s in SOURCE.items() for r in make_rows(n, s, 20_000, "train")])
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield pool.batch(torch.randint(len(pool), (batch,), generator=generator))

    return Domain(
        name="skills",
        vocabulary=128,
        end=END,
        pretraining=pretraining,
        train=target(train, "train"),
        valid=target(test, "valid"),
        test=target(test, "test"),
        source={n: Rows.of(make_rows(n, s, test, "test")) for n, s in SOURCE.items()},
    )
