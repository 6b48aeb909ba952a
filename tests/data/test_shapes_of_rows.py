"""Rows of every shape, from every kind of file, as a stream or not, are the same tokens; and what
stands beside a chat reaches the template."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from sweeps import swept
from tokenizers_of_all_kinds import characters

from leanlift import UserError
from leanlift.data.dataset import token_rows, tokenized
from leanlift.data.lengths import Cut
from leanlift.data.stream import token_stream
from leanlift.data.tokens import Tokenization
from leanlift.rows.source import load_rows, stream_rows

TEMPLATE = (
    "{% if tools %}[tools {% for t in tools %}{{ t.function.name }}{% endfor %}]{% endif %}"
    "{% if style %}({{ style }}){% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}<{{ c.function | tojson }}>{% endfor %}"
    "{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "int"}}}}]
BESIDE = {"tools": TOOLS, "chat_template_kwargs": {"style": "short"}, "system": "be kind"}
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "5"}
SHAREGPT = [
    {"from": "human", "value": "q"},
    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
    {"from": "observation", "value": "5"},
    {"from": "gpt", "value": "good"},
]
HEAD = "[tools add](short)[system]be kind</s>[user]q</s>"
CALLED = '[assistant]<{"name": "add", "arguments": {"a": 1}}></s>'
TURNS = [HEAD + CALLED, f"{HEAD}{CALLED}[tool]5</s>[assistant]good</s>"]

SHAPES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "messages": ({"messages": [USER, CALLING, RESULT, ANSWER], **BESIDE}, TURNS),
    "conversations": ({"conversations": SHAREGPT, **BESIDE}, TURNS),
    "prompt": ({"prompt": [USER], "completion": [CALLING], **BESIDE}, TURNS[:1]),
    "alpaca": (
        {"instruction": "q", "input": "", "output": "good", **BESIDE},
        [f"{HEAD}[assistant]good</s>"],
    ),
    "texts": ({"prompt": "q: ", "completion": "good"}, ["q: good</s>"]),
    "text": ({"body": "007"}, ["007</s>"]),
}


def written(path: Path, row: dict[str, Any]) -> str:
    """Three rows: a cell that is no text is JSON."""
    rows = [row] * 3
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            lines = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            lines.writerow(row)
            said = [v if isinstance(v, str) else json.dumps(v) for v in row.values()]
            lines.writerows([said] * 3)
    else:
        listed = path.suffix == ".json"
        path.write_text(json.dumps(rows) if listed else "\n".join(map(json.dumps, rows)))
    return str(path)


CASES = [(s, k) for s in SHAPES for k in (".json", ".jsonl", ".csv", ".tsv", ".parquet")]
CHEAP = (
    ("messages", ".parquet"),
    ("conversations", ".jsonl"),
    ("prompt", ".csv"),
    ("alpaca", ".tsv"),
    ("text", ".csv"),
)


@pytest.mark.parametrize(("shape", "kind"), swept(CASES, *CHEAP))
def test_every_shape_from_every_file_and_as_a_stream(shape: str, kind: str, tmp_path: Path) -> None:
    row, expected = SHAPES[shape]
    tokenizer = characters(TEMPLATE)
    how = Tokenization(tokenizer, text_field="body", ends=frozenset([tokenizer.eos_token_id]))
    path = written(tmp_path / f"rows{kind}", row)
    whole = token_rows(load_rows(path), how).data.select_columns(["input_ids", "labels"])
    assert [tokenizer.decode(each["input_ids"]) for each in whole] == expected * 3
    assert list(token_stream(stream_rows(path), how, "train", Cut())) == list(whole)
    evaluated = [tokens.labels for _, _, tokens in tokenized(load_rows(path), how, "eval")]
    assert evaluated == whole["labels"][:]
    trained = [t for t in whole[0]["labels"] if t != -100]
    assert tokenizer.decode(trained) == (
        expected[0].rpartition("[assistant]")[2].removeprefix("q: ")
    )


def test_columns_that_the_first_row_of_a_stream_lacks(tmp_path: Path) -> None:
    rows = [{"prompt": [USER], "completion": [ANSWER], **more} for more in ({}, BESIDE, {"id": 1})]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = characters(TEMPLATE)
    how = Tokenization.of(tokenizer)
    made = list(token_stream(stream_rows(str(path)), how, "train", Cut()))
    assert [set(row) for row in made] == [{"input_ids", "labels"}] * 3
    assert tokenizer.decode(made[1]["input_ids"]).startswith(HEAD)


def texts_of(*rows: dict[str, Any], template: str = TEMPLATE) -> tuple[list[str], str]:
    """All texts, and what is said of the rows."""
    tokenizer = characters(template)
    made = token_rows(list(rows), Tokenization.of(tokenizer))
    return [tokenizer.decode(row["input_ids"]) for row in made.data], str(made.report)


def test_a_chat_keeps_a_system_prompt_of_its_own() -> None:
    own = {"role": "system", "content": "own"}
    row = {"messages": [own, USER, ANSWER], "system": "column"}
    texts, said = texts_of(row)
    assert texts == ["[system]own</s>[user]q</s>[assistant]good</s>"]
    assert "a system prompt beside a chat that has one, which is not used, in 1 of 1 rows" in said
    _, said = texts_of({"messages": [own, USER, ANSWER], "system": "own"})
    assert "beside a chat" not in said
    _, said = texts_of({"prompt": "q", "completion": "a", "system": "s"})
    assert "a value of 'system' that is not used, since the row is no chat," in said


def test_roles_of_sharegpt_are_said() -> None:
    _, said = texts_of({"conversations": SHAREGPT})
    assert "turns of the role function_call taken for the assistant's tool_calls in 1 of 1" in said
    assert "the role observation taken for tool" in said


@pytest.mark.parametrize("call", ["f(1)", "[]", '{"arguments": {}}', '"f"', "[1]", 5, None])
def test_a_call_that_is_none_is_refused(call: Any) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": call}]
    with pytest.raises(UserError, match=r"row 0 .* no call in a turn of the role function_call"):
        texts_of({"conversations": turns})


def test_several_calls_in_a_turn() -> None:
    calls = [{"name": "add", "parameters": {"a": 1}}, {"name": "sub"}]
    turns = [{"from": "human", "value": "q"}, {"from": "tool_call", "value": json.dumps(calls)}]
    texts, _ = texts_of({"conversations": turns})
    assert texts[0].endswith(
        '[assistant]<{"name": "add", "arguments": {"a": 1}}><{"name": "sub", "arguments": {}}></s>'
    )


def test_a_completion_that_is_marked_as_wrong_is_said() -> None:
    rows = [{"prompt": "q", "completion": "a", "label": label} for label in (True, False)]
    texts, said = texts_of(*rows)
    assert len(texts) == 2
    assert "marked as wrong (label false), which is trained like the others, in 1 of 2" in said


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (("prompt", "chosen", "rejected"), "which --method dpo, orpo, cpo or reward trains on"),
        (("prompt", "solution"), "what --method grpo or rloo trains on"),
    ],
)
def test_rows_of_other_methods_are_named(columns: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        texts_of(dict.fromkeys(columns, "a"))
