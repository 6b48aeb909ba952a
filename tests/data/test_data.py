"""Rows as people have them become examples that TRL trains on, or one clear sentence."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from leanlift import UserError
from leanlift.data.dataset import to_examples

USER = {"role": "user", "content": "2+2?"}
ASSISTANT = {"role": "assistant", "content": "4"}


def examples(rows: list[dict[str, Any]], chat: bool = False) -> list[dict[str, Any]]:
    return list(to_examples(Dataset.from_list(rows), chat))


def test_prompt_and_text_stay_as_they_are() -> None:
    assert examples([{"prompt": "a", "completion": "b", "id": 1}]) == [
        {"prompt": "a", "completion": "b"}
    ]
    assert examples([{"text": "a"}]) == [{"text": "a"}]
    tokenized = Dataset.from_list([{"input_ids": [1, 2]}])
    assert to_examples(tokenized, chat=False) is tokenized


def test_alpaca_rows_become_prompts_or_chats() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "answer": "3"}
    (plain,) = examples([row])
    assert plain["completion"] == "3"
    assert plain["prompt"].endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    (bare,) = examples([{**row, "input": ""}])
    assert "### Input" not in bare["prompt"]
    (chat,) = examples([row], chat=True)
    assert chat["prompt"] == [{"role": "user", "content": "Add.\n\n1 2"}]
    assert chat["completion"] == [{"role": "assistant", "content": "3"}]


def test_every_assistant_turn_of_a_chat_is_one_example() -> None:
    turns = [USER, ASSISTANT, {"role": "user", "content": "3+3?"}, {**ASSISTANT, "content": "6"}]
    one, two = examples([{"messages": turns}], chat=True)
    assert (one["prompt"], one["completion"]) == (turns[:1], turns[1:2])
    assert (two["prompt"], two["completion"]) == (turns[:3], turns[3:])


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([], "holds no rows"),
        ([{"question": "a", "reply": "b"}], r"row 0 .* columns \['question', 'reply'\]"),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": None}],
            r"row 1 .* has no 'completion' \(columns found: \['prompt'\]\)",
        ),
        ([{"messages": [{"role": "user"}]}], "row 0 .* no list of role and content in 'messages'"),
        ([{"messages": [USER]}], "no row .* has an assistant message"),
        ([{"instruction": "a", "input": "b"}], r"columns \['input', 'instruction'\]"),
    ],
    ids=["empty", "unknown", "hole", "no-content", "no-answer", "no-output"],
)
def test_rows_that_cannot_be_used(rows: list[dict[str, Any]], match: str) -> None:
    with pytest.raises(UserError, match=match):
        examples(rows)
