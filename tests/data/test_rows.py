"""What a row loses or has changed on the way is counted and said; the rest arrives as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chats import ANSWER, ROWS, USER, call, write
from datasets import Dataset
from tokenizers_of_all_kinds import CHATML, characters

from leanlift import UserError
from leanlift.data.dataset import load_rows, to_examples, token_rows, tokenized
from leanlift.data.tokens import Tokenization
from leanlift.rows.source import as_dataset


def test_what_chats_become_is_a_plain_dataset_where_that_is_exact() -> None:
    plain = to_examples(Dataset.from_list([{"messages": [USER, ANSWER]}] * 2), chat=True)
    assert plain.format["type"] is None
    assert list(plain) == [{"prompt": [USER], "completion": [ANSWER]}] * 2
    mixed = to_examples(as_dataset(ROWS), chat=True)
    assert mixed[1]["completion"] == ROWS[1]["messages"][1:]


@pytest.mark.parametrize("source", ["file", "list", "arrow"])
def test_a_template_sees_the_keys_that_a_row_has(tmp_path: Path, source: str) -> None:
    rows: Any = [{"messages": [USER, call(a=2, b=3)]}, {"messages": [USER, call(zone="utc")]}]
    if source == "file":
        rows = load_rows(str(write(tmp_path / "rows.jsonl", rows)))
    elif source == "arrow":
        rows = Dataset.from_list(rows)
        assert rows[1]["messages"][1]["tool_calls"][0]["function"]["arguments"]["a"] is None
    tokenizer = characters(CHATML)
    made = token_rows(rows, Tokenization.of(tokenizer))
    texts = [tokenizer.decode(row["input_ids"]) for row in made.data]
    assert texts[0].endswith('<{"name": "f", "arguments": {"a": 2, "b": 3}}></s>\n')
    assert texts[1].endswith('<{"name": "f", "arguments": {"zone": "utc"}}></s>\n')
    said = "nulls in tools or tool calls left out as missing keys in 2 of 2 rows (first: row 0)"
    assert (said in str(made.report)) is (source == "arrow")


# --- what is dropped or changed ---------------------------------------------------------------


def report_of(rows: list[dict[str, Any]], template: str | None = CHATML) -> tuple[list[str], str]:
    """The trained texts, and what is said."""
    tokenizer = characters(template)
    made = token_rows(rows, Tokenization.of(tokenizer))
    texts = [tokenizer.decode([t for t in row["labels"] if t != -100]) for row in made.data]
    return [text.strip().removesuffix("</s>") for text in texts], str(made.report)


CHAT = {"messages": [USER, ANSWER]}


def turns(*said: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": r, "content": c, **more} for r, c in said]}


@pytest.mark.parametrize(
    ("rows", "trained", "said"),
    [
        (
            [CHAT, turns(("user", "q"), ("critic", "b")), turns(("user", "q"))],
            ["a"],
            "no assistant turn, so nothing to train, in 2 of 3 rows (first: row 1)",
        ),
        (
            [CHAT, turns(("human", "q"), ("gpt", "b"))],
            ["a", "b"],
            "the role gpt taken for assistant in 1 of 2 rows (first: row 1)",
        ),
        (
            [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "b"}]}],
            ["b"],
            "the role human taken for user in 1 of 1 rows (first: row 0)",
        ),
        (
            [{"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]}],
            ["a"],
            "an assistant turn of weight 0, which is not trained, in 1 of 1 rows (first: row 0)",
        ),
        (
            [turns(("user", [{"type": "text", "text": "q"}]), ("assistant", [{"text": "x"}] * 2))],
            ["xx"],
            "contents joined from their text parts in 1 of 1 rows (first: row 0)",
        ),
        (
            [turns(("assistant", "hi"), ("user", "q"), ("assistant", "b"))],
            ["b"],
            "an assistant turn with nothing before it, which is not trained, in 1 of 1",
        ),
        (
            [CHAT, turns(("user", "q"), ("assistant", ""))],
            ["a"],
            "an empty text or completion, which is not trained, in 1 of 2 rows (first: row 1)",
        ),
        ([{"text": ""}, {"text": "a"}], ["a"], "an empty text or completion, which is not trai"),
        ([{"prompt": "q", "completion": ""}, {"prompt": "", "completion": "a"}], ["a"], "an empty"),
        ([{"instruction": "q", "output": ""}, {"instruction": "", "output": "a"}], ["a"], "an emp"),
        ([{**CHAT, "source": "x", "n": 1}], ["a"], "columns not used: n, source"),
        (
            [{"prompt": "q", "completion": "a", "tools": [{}]}],
            ["a"],
            "a value of 'tools' that is not used, since the row is no chat, in 1 of 1 rows",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_what_is_dropped_or_changed_is_said(
    rows: list[dict[str, Any]],
    trained: list[str],
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    texts, report = report_of(rows)
    assert texts == trained
    assert said in report
    how = Tokenization.of(characters(CHATML))
    assert len(list(tokenized(rows, how, "eval"))) == len(trained)  # as `leanlift eval` reads them
    assert said in caplog.text


def test_nothing_is_said_where_nothing_happened() -> None:
    assert report_of([CHAT])[1] == "train: 1 examples, the longest has 23 tokens."


def test_weights_do_not_reach_the_template() -> None:
    template = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
    rows = [{"messages": [USER, {**ANSWER, "weight": 1}]}]
    assert "weight" not in report_of(rows, template)[0][0]


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([{"text": "a"}, {"text": 7}], "row 1 .* has 7 in 'text': expected a text"),
        ([{"prompt": "a", "completion": 1}], "row 0 .* has 1 in 'completion'"),
        ([{"prompt": 2.5, "completion": "b"}], "row 0 .* has 2.5 in 'prompt'"),
        (
            [{"prompt": "a", "completion": ["x"]}],
            "row 0 .* no chat in 'prompt' but a list in 'comp",
        ),
        ([{"prompt": [USER], "completion": "x"}], "row 0 .* no chat in 'completion' but a list"),
        ([{"prompt": [USER], "completion": ["x"]}], "no list of role and content in 'completion'"),
        ([{"prompt": [], "completion": [ANSWER]}], "no turn in 'prompt'"),
        ([{"instruction": "a", "output": 1}], "row 0 .* has 1 in 'output'"),
        ([{"instruction": "a", "input": 0, "output": "b"}], "row 0 .* has 0 in 'input'"),
        ([{"instruction": {"a": 1}, "output": "b"}], "in 'instruction': expected a text"),
        ([CHAT, {"messages": "q"}], "row 1 .* no list of role and content in 'messages'"),
        ([{"messages": [USER, {**ANSWER, "content": 4}]}], "row 0 .* has 4 in 'messages'"),
        ([{"messages": [{**USER, "content": None}, ANSWER]}], "no list of role and content"),
        ([{"messages": [USER, {**ANSWER, "content": None}]}], "no list of role and content"),
        (
            [turns(("user", [{"type": "image_url", "image_url": "x"}]), ("assistant", ["a"]))],
            "row 0 .* has a content part 'image_url' in 'messages': expected texts alone",
        ),
        (
            [CHAT, turns(("user", [{"type": "text", "text": "q"}]))],
            "row 1 .* is a list of parts, and another .row 0. is a text",
        ),
        ([{"messages": [USER, {**ANSWER, "weight": 0.5}]}], "a turn of weight 0.5 .* 0 or 1"),
        ([{"messages": [USER, {**ANSWER, "weight": "0"}]}], "a turn of weight '0'"),
        ([{**CHAT, "tools": "none"}], "row 0 .* a text in 'tools' that is no JSON"),
        ([{**CHAT, "tools": {"a": 1}}], "row 0 .* in 'tools': expected a list"),
        ([{**CHAT, "chat_template_kwargs": [1]}], "'chat_template_kwargs': expected a dict"),
        ([{"text": "a\ud83d"}], "row 0 .* half of a surrogate pair in 'text'"),
        ([{"text": ""}, {"text": ""}], "no row of the train dataset leaves something to train on"),
        ([CHAT, [USER, ANSWER]], "row 1 is a list: expected a dict"),
        ([{"text": "a", "x": {1, 2}}], "row 0 has a value in 'x' that JSON has no form for"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_values_that_cannot_be_meant_are_refused_with_row_and_column(
    rows: list[Any], match: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=match):
        report_of(rows)
    if "is a list: expected a dict" in match or "JSON has no form" in match:
        return  # no such thing in a file
    with pytest.raises(UserError, match=match):
        report_of(load_rows(str(write(tmp_path / "rows.json", rows))))


def test_a_whole_chat_cannot_leave_a_turn_out() -> None:
    rows = [{"messages": [USER, {**ANSWER, "weight": 0}]}]
    how = Tokenization(characters(CHATML), completion_only=False)
    with pytest.raises(UserError, match="a turn of weight 0 in 'messages', which completion_only"):
        token_rows(rows, how)


@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
def test_a_call_needs_no_content(key: str) -> None:
    call = {"name": "f", "arguments": "{}"}
    for content in ({"content": None}, {"content": ""}, {}):
        turn = {"role": "assistant", key: [call] if key == "tool_calls" else call, **content}
        (example,) = to_examples(as_dataset([{"messages": [USER, turn]}]), chat=True)
        assert example["completion"] == [turn]


def test_tools_as_json_text_reach_the_template() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    tokenizer = characters(CHATML)
    for given in (tools, json.dumps(tools)):
        for row in ({**CHAT, "tools": given}, {"prompt": [USER], "completion": [ANSWER]}):
            (found,) = tokenized([{**row, "tools": given}], Tokenization.of(tokenizer))
            text = tokenizer.decode(found[2].ids)
            assert text.startswith('[tools][{"type": "function", "function": {"name": "f"}}]')
