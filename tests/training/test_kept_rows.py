"""Which rows `keep_dataset_name` names, and what of them counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import make_checkpoint, make_tokenizer

from leanlift.data.tokens import Tokenization
from leanlift.paired import change
from leanlift.training import LiftSFTConfig, RunArguments, kept
from leanlift.training.kept_rows import kept_rows


def test_turns_of_a_chat_are_one_row_and_all_of_a_text_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a run trains alone; and a turn that max_length leaves nothing of is no turn."""
    base, place = make_checkpoint(tmp_path / "base"), tmp_path
    monkeypatch.chdir(place)
    turns = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": w}] for w in "ab"]
    long = [{"role": "user", "content": "q" * 50}, {"role": "assistant", "content": "a"}]
    chats = [{"messages": turns[0] + turns[1]}, {"messages": long}, {"messages": turns[1]}]
    (place / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (place / "texts.jsonl").write_text('{"text": "a text"}\n')
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    only = Tokenization(tokenizer, completion_only=True)
    args = RunArguments(str(base), "rows.jsonl", keep_dataset_name=["chats.jsonl", "texts.jsonl"])
    loop = LiftSFTConfig(str(place), use_cpu=True, max_length=40)
    first, second = kept_rows(args, loop, only)
    assert first.origin == (0, 0, 2)
    assert second.tokens == [len("a text")]  # all but the first token, and the end
    only_assistant = replace(only, completion_only=None, assistant_only=True)
    assert kept_rows(replace(args, keep_dataset_name="texts.jsonl"), loop, only_assistant)
    counts, before, after = first.tokens, [3.0, 3.0, 3.0], [4.0, 3.5, 3.25]
    expected = change(before, after, counts, [0, 0, 2])
    assert expected is not None
    assert kept._kept(first, before, after).error == expected.error
