"""What is judged of the rows of an evaluation, and with which answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import load, make_tokenizer

from leanlift.evaluation.evaluate import (
    evaluate,
    to_samples,
)


def test_what_wants_nothing_of_the_judges_kind_is_not_counted(base: Path) -> None:
    rows = [{"prompt": "a", "completion": "12"}, {"prompt": "b", "completion": "no number"}]
    found = evaluate(
        load(base, "dense"),
        make_tokenizer(),
        rows,
        max_new_tokens=2,
        progress=False,
        judge="number",
    )
    assert (found.generated, found.judged, found.judge) == (2, 1, "number")


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_the_answer_of_a_chat_is_that_of_its_last_turn(key: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    names = ("role", "content") if key == "messages" else ("from", "value")
    people = ("user", "assistant") if key == "messages" else ("human", "gpt")
    turns = [dict(zip(names, turn, strict=True)) for turn in zip(people * 2, "abcd", strict=True)]
    rows = [
        {key: turns, "answer": "7"},
        {key: turns[:2], "answer": "8"},
        {key: turns, "answer": None},
    ]
    found = [(s.expected, s.answer) for s in to_samples(rows, tokenizer)]
    assert found == [(None, None), ("d", "7"), ("b", "8"), ("b", None), ("d", None)]
