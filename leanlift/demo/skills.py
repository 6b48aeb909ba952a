"""Exact-answer string skills: the text the demo model is trained, fine-tuned and tested on.

Every row is a prompt such as ``"reverse: hxqzb = "`` with its one right completion, ``"bzqxh"``,
so accuracy is a plain string comparison and needs no judgement.

The base model knows four skills on words and one, ``echo``, on numbers. The skill it does not know,
``next``, is a second one on numbers. Words and numbers are asked for in two formats, so that
accuracy on the words tells whether fine-tuning reached beyond its own subject, and accuracy on
``echo`` what it did to the known skill nearest to the new one.
"""

from __future__ import annotations

import random
import string
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

LETTERS = string.ascii_lowercase
DIGITS = string.digits
MIN_LENGTH = 4
MAX_LENGTH = 7
HELDOUT_SHARE = 10  # one text in this many belongs to the held-out split
SPLITS = ("train", "heldout")

Row = dict[str, str]


@dataclass(frozen=True)
class Skill:
    """One exact rule from text to text, the characters it works on and how it is asked for."""

    rule: Callable[[str], str]
    alphabet: str
    template: str


def copy(text: str) -> str:
    """Return the text as it is: hxqzb -> hxqzb."""
    return text


def reverse(text: str) -> str:
    """Turn the text around: hxqzb -> bzqxh."""
    return text[::-1]


def rotate(text: str) -> str:
    """Move the first character to the end: hxqzb -> xqzbh."""
    return text[1:] + text[:1]


def previous_letters(text: str) -> str:
    """Replace each letter by the one before it, a by z: hxqza -> gwpyz."""
    return "".join(LETTERS[LETTERS.index(letter) - 1] for letter in text)


def next_digits(text: str) -> str:
    """Replace each digit by the one after it, 9 by 0: 48219 -> 59320."""
    return "".join(str((int(digit) + 1) % 10) for digit in text)


SKILLS: dict[str, Skill] = {
    "copy": Skill(copy, LETTERS, "copy: {} = "),
    "reverse": Skill(reverse, LETTERS, "reverse: {} = "),
    "rotate": Skill(rotate, LETTERS, "rotate: {} = "),
    "prev": Skill(previous_letters, LETTERS, "prev: {} = "),
    "echo": Skill(copy, DIGITS, "echo {} -> "),
    "next": Skill(next_digits, DIGITS, "next {} -> "),
}
SOURCE_SKILLS = ("copy", "reverse", "rotate", "prev", "echo")
TARGET_SKILL = "next"


def split_of(text: str) -> str:
    """Name the split a text belongs to.

    The text alone decides, not a seed or a count, so the two splits can never share a text,
    whichever skill, size or seed each of them was drawn with.
    """
    return "heldout" if zlib.crc32(text.encode("ascii")) % HELDOUT_SHARE == 0 else "train"


def rows(skill: str, *, split: str = "train", seed: int = 0) -> Iterator[Row]:
    """Draw rows of one skill without end, repeats included; the same seed gives the same rows."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    chosen = SKILLS[skill]
    rng = random.Random(f"{skill}/{split}/{seed}")
    while True:
        text = "".join(rng.choices(chosen.alphabet, k=rng.randint(MIN_LENGTH, MAX_LENGTH)))
        if split_of(text) == split:
            yield {"prompt": chosen.template.format(text), "completion": chosen.rule(text)}


def make_rows(skill: str, count: int, *, split: str = "train", seed: int = 0) -> list[Row]:
    """Make `count` different rows of one skill from one split."""
    distinct: dict[str, Row] = {}
    source = rows(skill, split=split, seed=seed)
    while len(distinct) < count:
        row = next(source)
        distinct.setdefault(row["prompt"], row)
    return list(distinct.values())
