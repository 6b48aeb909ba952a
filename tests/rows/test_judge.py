"""When an answer is right."""

from __future__ import annotations

import pytest

from leanlift.evaluation.evaluate import Sample
from leanlift.rows.judge import (
    JUDGES,
    are_sentences,
    is_right,
    judged_words,
    last_number,
    same_answer,
)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 1,200 + 34 = 1,234.", 1234.0),
        ("The answer is -5.", -5.0),
        ("$3.50 each, 7 in all: 24.5 dollars", 24.5),
        ("1, 2, 3", 3.0),
        ("none", None),
    ],
)
def test_last_number(text: str, number: float | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("that is 576", "576.0", True),
        ("576 minus 1 is 575", "576", False),
        ("it is 0.3334", "0.333", True),
        ("1,000", "1000", True),
        ("no number", "1", False),
        ("A or B? The answer is (B).", "B", True),
        ("the correct answer is option2", "option2", True),
        ("the correct answer is false", "true", False),
        (" Paris ", "Paris", True),
    ],
)
def test_answers(text: str, answer: str, right: bool) -> None:
    assert same_answer(text, answer) is right


COMPARISONS = {
    "number": [("is 1,234.", "so 1234", True), ("1 2", "2 1", False), ("7", "none", None)],
    "letter": [("so (B)", "Answer: B", True), ("A or B", "A", False), ("A", "none", None)],
    "label": [("it is true", "so: true", True), ("true", "false", False), ("x", "X Y", None)],
    "text": [(" a b ", "a b", True), ("a  b", "a b", False), ("", "", True)],
    "contains": [
        ("It is PARIS\nindeed", "paris indeed", True),
        ("a", "b", False),
        ("a", " ", None),
    ],
    "auto": [("so 5", "5", False), ("5", "5", True), (" a ", "a", True)],
}


@pytest.mark.parametrize("judge", JUDGES)
def test_each_judge_compares_its_part(judge: str) -> None:
    for text, expected, right in COMPARISONS[judge]:
        assert is_right(text, Sample([1], [1], [1], expected), judge) is right, (text, expected)
    answered = Sample([1], [1], [1], "nothing of it", "5.0")
    assert is_right("so it is 5", answered, "auto") is True
    assert is_right("so it is 5", answered, "text") is False
    said = judged_words([answered], judge)
    assert said.startswith("Exact match compares ")
    assert "the answer column" in said


def test_the_judges_are_those_that_the_command_line_offers() -> None:
    assert set(COMPARISONS) == set(JUDGES)


def test_sentences_are_told_from_words() -> None:
    long = [Sample([1], [1], [1], "it is because the sky is blue")]
    assert are_sentences(long, "auto")
    assert not are_sentences(long, "contains")
    assert not are_sentences([Sample([1], [1], [1], "blue")], "auto")
    assert not are_sentences([Sample([1], [1], [1], long[0].expected, "4")], "auto")
