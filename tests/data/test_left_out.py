"""What a chat template leaves out of a row is counted and said, whatever it is."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from datasets import Dataset
from tokenizers_of_all_kinds import characters

from leanlift.data.dataset import token_rows, tokenized
from leanlift.data.lengths import Cut
from leanlift.data.stream import token_stream
from leanlift.data.tokens import Tokenization

USER, ANSWER = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {}}}

PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
TWO_ROLES = (
    "{% for m in messages %}{% if m['role'] in ('user', 'assistant') %}"
    "{{ m['role'] + ': ' + m['content'].split('</think>')[-1] + '</s>' }}{% endif %}{% endfor %}"
)
KNOWS_ALL = (
    "{{ tools | tojson if tools else '' }}{{ mood }}{% for m in messages %}{{ m['role'] }}: "
    "{{ m.thoughts }}{{ m.train }}{{ m['content'] | trim }}{{ (m.tool_calls or '') | tojson }}</s>"
    "{% endfor %}"
)

LEFT_OUT: dict[str, tuple[str, dict[str, Any], str]] = {
    "a role": (
        TWO_ROLES,
        {"messages": [{"role": "developer", "content": "be brief"}, USER, ANSWER]},
        "'content' of an earlier developer turn",
    ),
    "thoughts in a content": (
        TWO_ROLES,
        {"messages": [USER, {"role": "assistant", "content": "<think>hm</think>because"}]},
        "'content' of a trained assistant turn",
    ),
    "thoughts": (
        PLAIN,
        {"messages": [USER, {**ANSWER, "thoughts": "hm"}]},
        "'thoughts' of a trained assistant turn",
    ),
    "earlier thoughts": (
        PLAIN,
        {"messages": [USER, {**ANSWER, "thoughts": "hm"}, USER, ANSWER]},
        "'thoughts' of an earlier assistant turn",
    ),
    "a mark": (
        PLAIN,
        {"messages": [USER, {**ANSWER, "train": False}]},
        "'train' of a trained assistant turn",
    ),
    "a call": (
        PLAIN,
        {"messages": [USER, {**ANSWER, "tool_calls": [CALL]}]},
        "'tool_calls' of a trained assistant turn",
    ),
    "tools": (PLAIN, {"messages": [USER, ANSWER], "tools": TOOLS}, "'tools'"),
    "an option": (
        PLAIN,
        {"messages": [USER, ANSWER], "chat_template_kwargs": {"mood": "calm"}},
        "'mood' of chat_template_kwargs",
    ),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_a_template_leaves_out_is_said(name: str, caplog: pytest.LogCaptureFixture) -> None:
    template, row, what = LEFT_OUT[name]
    line = f"{what}, left out by the chat template at least in part,"
    rows = [{"messages": [USER, ANSWER]}, row]
    how = Tokenization.of(characters(template))
    notes = token_rows(rows, how).report.notes
    assert f"{line} in 1 of 2 rows (first: row 1)" in notes
    with caplog.at_level(logging.WARNING, "leanlift"):
        list(tokenized(rows, how))  # as evaluation reads them
    assert line in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "leanlift"):
        list(token_stream(Dataset.from_list([row]).to_iterable_dataset(), how, "train", Cut()))
    assert f"row 0 of the train dataset: {line[:-1]}." in caplog.text


@pytest.mark.parametrize("name", [name for name in LEFT_OUT if LEFT_OUT[name][0] == PLAIN])
def test_nothing_is_said_of_a_template_that_takes_it(name: str) -> None:
    _, row, _ = LEFT_OUT[name]
    rows = [{"messages": [USER, ANSWER]}, row]
    assert token_rows(rows, Tokenization.of(characters(KNOWS_ALL))).report.notes == ()


def test_spaces_quotes_and_labels_are_no_loss() -> None:
    content = '  say "yes"\n\nor ü  '
    turns = [{**USER, "content": content, "name": "Ann"}, {**ANSWER, "content": content}]
    quoted = "{% for m in messages %}{{ m['content'] | tojson }}</s>{% endfor %}"
    for template in (PLAIN, KNOWS_ALL, quoted):
        made = token_rows([{"messages": turns}], Tokenization.of(characters(template)))
        assert not any("left out" in note for note in made.report.notes)
