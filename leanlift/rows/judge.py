"""Whether a greedy text is what a row wants, and how that was judged.

What is wanted is the `answer` column where a row has one, else its completion. Of both sides the
same part is compared: the last number, the last letter A to E, the last label, the whole text; or
the text has only to contain what is wanted. "auto" takes the part that an answer is made of, and
the whole text where there is no answer column.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from leanlift.errors import UserError

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
LETTER = re.compile(r"\b[A-E]\b")
LABEL = re.compile(r"\b(?:true|false|[a-z]+\d)\b")
TOLERANCE = 1e-3
JUDGES = ("auto", "number", "letter", "label", "text", "contains")
COMPARED = {
    "number": "the last number of the text with the last number of {wanted}, within 0.001",
    "letter": "the last letter A to E of the text with that of {wanted}",
    "label": "the last label (true, false, option2) of the text with that of {wanted}",
    "text": "the whole text with {wanted}",
    "contains": "texts: the text has to contain {wanted}, whatever the case of letters",
}
"""What was compared, by judge."""

SENTENCE = 6
"""Words from which an expected text is a sentence, which no greedy text repeats word for word."""


class Wanting(Protocol):
    """What a judge needs of a sample."""

    @property
    def expected(self) -> str | None:
        """The text that should have been written."""

    @property
    def answer(self) -> str | None:
        """What the row's answer column says, where it has one."""


def check_judge(judge: str) -> None:
    """Raises a UserError for a name that is none."""
    if judge not in JUDGES:
        raise UserError(f"expected a judge among {', '.join(JUDGES)}, got {judge!r}.")


def judge_for(sample: Wanting, judge: str = "auto") -> str:
    """The judge of one sample: "auto" is the part that its answer is made of."""
    if judge != "auto":
        return judge
    if sample.answer is None:
        return "text"
    wanted = sample.answer.strip()
    if NUMBER.fullmatch(wanted.replace(",", "")):
        return "number"
    if LETTER.fullmatch(wanted):
        return "letter"
    return "label" if LABEL.fullmatch(wanted) else "text"


def is_right(text: str, sample: Wanting, judge: str = "auto") -> bool | None:
    """Whether a text is what a sample wants; None where it wants nothing of the judge's kind."""
    wanted = sample.answer if sample.answer is not None else (sample.expected or "")
    return _compare(judge_for(sample, judge), text, wanted)


def same_answer(text: str, answer: str) -> bool:
    """Compare the answer that a text ends with, as the arithmetic benchmarks do.

    A number: the last number of the text, thousands separators left out, within 1e-3. A choice
    A to E: the last such letter that stands alone. A label such as "true" or "option2": the last
    label in the text. Anything else: the stripped text.
    """
    return bool(is_right(text, _Answer(answer)))


class _Answer:
    expected = None

    def __init__(self, answer: str) -> None:
        self.answer = answer


def _compare(judge: str, text: str, wanted: str) -> bool | None:
    if judge == "number":
        want, found = last_number(wanted), last_number(text)
        return None if want is None else found is not None and abs(found - want) <= TOLERANCE
    if judge in ("letter", "label"):
        pattern = LETTER if judge == "letter" else LABEL
        last = pattern.findall(wanted)[-1:]
        return pattern.findall(text)[-1:] == last if last else None
    if judge == "contains":
        return _plain(wanted) in _plain(text) if _plain(wanted) else None
    return text.strip() == wanted.strip()


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def last_number(text: str) -> float | None:
    """The last number in a text: "so 1,200 + 34 = 1,234." gives 1234."""
    found = NUMBER.findall(re.sub(r"(?<=\d),(?=\d{3})", "", text))
    return float(found[-1]) if found else None


def judges_used(samples: Sequence[Wanting], judge: str) -> Counter[str]:
    """How many samples each judge was for."""
    return Counter(judge_for(sample, judge) for sample in samples)


def judged_words(samples: Sequence[Wanting], judge: str) -> str:
    """A sentence on what was compared with what."""
    columns = {sample.answer is not None for sample in samples}
    wanted = "the answer column" if True in columns else "the completion"
    if len(columns) > 1:
        wanted = "the answer column, or the completion where there is no answer"
    used = judges_used(samples, judge)
    parts = [
        COMPARED[name].format(wanted=wanted) + (f" ({n} rows)" if len(used) > 1 else "")
        for name, n in used.most_common()
    ]
    return f"Exact match compares {'; '.join(parts)}."


def are_sentences(samples: Sequence[Wanting], judge: str) -> bool:
    """Whether "auto" compares whole sentences, of which an exact match says next to nothing."""
    texts = [s.expected or "" for s in samples if judge_for(s, judge) == "text" and not s.answer]
    long = [len(text.split()) for text in texts]
    if judge != "auto" or not long:
        return False
    import statistics  # not for `leanlift --help`

    return statistics.median(long) >= SENTENCE
