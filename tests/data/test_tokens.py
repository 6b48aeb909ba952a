"""Examples become tokens as TRL's own trainer has it, and everywhere the same ones."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from tiny import load
from tokenizers_of_all_kinds import (
    CHATML,
    MARKED,
    SWITCHED,
    THINKING,
    characters,
    merging,
    wrapping,
)
from trl import SFTConfig, SFTTrainer

from leanlift import LiftConfig, LiftTrainer, UserError, get_lift_model
from leanlift.data.dataset import calibration_batches, token_rows, tokenized
from leanlift.data.lengths import Cut, say
from leanlift.data.tokens import Tokenization
from leanlift.evaluation.evaluate import to_samples
from leanlift.training import LiftSFTConfig

USER = {"role": "user", "content": "2+2?"}
FOUR = {"role": "assistant", "content": "4"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}

TEXTS = [{"text": "so it is"}, {"text": "it ends</s>"}]
STRINGS = [
    {"prompt": "is it so: ", "completion": "it is"},
    {"prompt": "so it", "completion": " is</s>"},
    {"prompt": "", "completion": "it"},
]
CHATS = [{"messages": [USER, FOUR, {"role": "user", "content": "3+3?"}, {**FOUR, "content": "6"}]}]
THOUGHTS = [{"messages": [USER, {**FOUR, "content": "well</think>4"}]}, *CHATS]
CALLS = [{"messages": [USER, CALL, {"role": "tool", "content": "4"}, FOUR], "tools": [TOOL]}]
STYLED = [{**CHATS[0], "chat_template_kwargs": {"style": "dry"}}]
ALPACA = [{"instruction": "Add.", "input": "1 2", "output": "3"}]
GIVEN = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [5, 6], "labels": [5, 6]}]

KINDS = {
    "text": (characters(), TEXTS),
    "text-bos": (wrapping(), TEXTS),
    "text-merges": (merging(), TEXTS),
    "strings": (characters(), STRINGS),
    "strings-bos": (wrapping(), STRINGS),
    "strings-merges": (merging(), STRINGS),
    "chats": (characters(CHATML), CHATS),
    "chats-merges": (merging(CHATML), CHATS),
    "thinking": (characters(THINKING), THOUGHTS),
    "tools": (characters(CHATML), CALLS),
    "kwargs": (characters(SWITCHED), STYLED),
    "alpaca": (characters(), ALPACA),
    "alpaca-chat": (characters(CHATML), ALPACA),
    "given": (characters(), GIVEN),
    "chats-of-prompts": (
        characters(CHATML),
        [{"prompt": [USER], "completion": [FOUR]}, {"prompt": [USER], "completion": [CALL, FOUR]}],
    ),
}


def by_trl(example: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """What stock TRL's preparation makes of an example, which needs no model."""
    data = Dataset.from_list([example])
    args = SFTConfig(bf16=False, report_to="none", max_length=None)
    own = SimpleNamespace(
        _tokenizer=tokenizer, chat_template=None, completion_only_loss="prompt" in example
    )
    (made,) = SFTTrainer._prepare_dataset(own, data, tokenizer, args, False, None, "train")
    return {key: made[key] for key in ("input_ids", "labels")}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_trl_everywhere(kind: str) -> None:
    tokenizer, rows = KINDS[kind]
    how = Tokenization.of(tokenizer)
    found = list(token_rows(rows, how).data)
    examples = [example for _, example, _ in tokenized(rows, how)]
    assert found == [by_trl(example, tokenizer) for example in examples]
    samples = to_samples(rows, tokenizer)
    assert [(s.whole, s.labels) for s in samples] == [(r["input_ids"], r["labels"]) for r in found]
    batches = calibration_batches(rows, tokenizer, None, 99)
    assert [{key: value[0].tolist() for key, value in b.items()} for b in batches] == found


def trainer_of(base: Path, rows: Any, tokenizer: Any, out: Path, **changes: Any) -> LiftTrainer:
    settings = {"max_length": 256, **changes}
    return LiftTrainer(
        model=get_lift_model(load(base, "dense"), LiftConfig(approx_rank=2), progress=False),
        args=LiftSFTConfig(
            output_dir=str(out), use_cpu=True, bf16=False, save_strategy="no", **settings
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("kind", ["strings", "tools", "thinking", "given"])
def test_a_trainer_trains_these_tokens(base: Path, tmp_path: Path, kind: str) -> None:
    tokenizer, rows = KINDS[kind]
    trainer = trainer_of(base, rows, tokenizer, tmp_path)
    expected = list(token_rows(rows, Tokenization.of(tokenizer)).data)
    assert list(trainer.train_dataset) == expected


def test_no_start_or_end_token_is_doubled() -> None:
    both = wrapping(start=True, end=True)
    rows = [*STRINGS, {"prompt": "<unk>a", "completion": "b"}]
    for _, example, tokens in tokenized(rows, Tokenization.of(both)):
        assert (tokens.ids[0], tokens.ids[-1]) == (2, 1)
        assert (tokens.ids.count(2), tokens.ids.count(1)) == (1, 1)
        assert 1 not in tokens.prompt
        text = both.decode([t for t in tokens.labels if t != -100])
        assert text == example["completion"].removesuffix("</s>") + "</s>"


def test_what_is_expected_of_an_answer_is_what_was_trained() -> None:
    tool, four = to_samples(CALLS, characters(CHATML))
    assert tool.expected == '<{"name": "add", "arguments": {"a": 2}}>'
    assert four.expected == "4"
    assert to_samples(THOUGHTS, characters(THINKING))[0].expected == "4"
    assert [s.expected for s in to_samples(STRINGS, characters())] == ["it is", " is", None]


def test_prompts_that_are_no_prefix_are_said() -> None:
    report = token_rows(THOUGHTS, Tokenization.of(characters(THINKING))).report
    assert "3 prompts end differently alone" in str(report)
    assert "(first: row 0)" in str(report)


def test_settings_that_choose_what_is_trained() -> None:
    def trained(rows: Any, template: str | None, **settings: Any) -> list[str]:
        tokenizer = characters(template)
        how = Tokenization.of(tokenizer, LiftSFTConfig(use_cpu=True, bf16=False, **settings))
        return [
            tokenizer.decode([token for token in row["labels"] if token != -100])
            for row in token_rows(rows, how).data
        ]

    whole = "[user]2+2?</s>[assistant]4</s>[user]3+3?</s>[assistant]6</s>"
    assert trained(CHATS, MARKED) == ["4</s>", "6</s>"]
    assert trained(CHATS, MARKED, completion_only_loss=False) == [whole]
    assert trained(CHATS, MARKED, assistant_only_loss=True) == ["4</s>", "6</s>"]
    assert trained(STRINGS[:1], None, completion_only_loss=False) == ["is it so: it is</s>"]
    assert trained([{"content": "a", "text": "b"}], None, dataset_text_field="content") == ["a</s>"]
    row = {"instruction": "a", "output": "b", "content": "c"}
    assert trained([row], None, dataset_text_field="content") == ["c</s>"]
    mask = {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1], "attention_mask": [1, 1, 0]}
    how = Tokenization.of(characters())
    assert list(token_rows([mask], how).data) == [{"input_ids": [5, 6], "labels": [-100, 6]}]


@pytest.mark.parametrize(
    ("rows", "template", "settings", "match"),
    [
        (CHATS, CHATML, {"assistant_only_loss": True}, "needs a chat template with {% generation"),
        (STRINGS, MARKED, {"assistant_only_loss": True}, "row 0 .* is no chat, and assistant_only"),
        (
            TEXTS,
            None,
            {"completion_only_loss": True},
            "row 0 .* is a text, which has no completion",
        ),
        (CHATS, None, {}, "row 0 .* is a chat, and the tokenizer has no chat template"),
        (STYLED, SWITCHED + "{{ raise_exception('no') }}", {}, "row 0 .* chat template: no"),
        (CHATS, "{{ messages[9].content.upper() }}", {}, "row 0 .* put into the chat template"),
        ([{**CHATS[0], "chat_template_kwargs": {"tokenize": False}}], CHATML, {}, "row 0 .* templ"),
    ],
    ids=["unmarked", "no-chat", "no-completion", "no-template", "raises", "stumbles", "reserved"],
)
def test_rows_that_the_settings_cannot_go_with(
    rows: Any, template: str | None, settings: dict[str, Any], match: str
) -> None:
    with pytest.raises(UserError, match=match):
        how = Tokenization.of(
            characters(template), LiftSFTConfig(use_cpu=True, bf16=False, **settings)
        )
        token_rows(rows, how)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"input_ids": [5, "6"]}, "row 1 .* no list of whole numbers in 'input_ids'"),
        ({"input_ids": [5, 200]}, "row 1 .* the id 200, and the base's embedding has 100 rows"),
        ({"input_ids": [5, -1]}, "row 1 .* with the id -1"),
        ({"input_ids": [5, 6], "labels": [5]}, "row 1 .* 2 input_ids and 1 labels"),
        ({"input_ids": [5, 6], "labels": [5, 100]}, "row 1 .* the label 100"),
        ({"input_ids": [5, 6], "labels": [-1, 5]}, "row 1 .* the label -1"),
        ({"input_ids": [5, 6], "completion_mask": [1]}, "row 1 .* 1 completion_mask"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_tokens_that_no_embedding_has(row: dict[str, Any], match: str) -> None:
    good = {"input_ids": [5, 6]}
    with pytest.raises(UserError, match=match):
        token_rows([good, row], Tokenization.of(characters(), rows=100))


def test_a_token_beyond_the_embedding_is_named() -> None:
    tokenizer = characters()
    tokenizer.add_tokens(["<far>"])
    how = Tokenization.of(tokenizer, rows=len(tokenizer) - 1)
    with pytest.raises(UserError, match=r"row 1 of the train dataset has a token.*'<far>'"):
        token_rows([{"text": "a"}, {"text": "a<far>"}], how)


def test_cutting_and_packing_are_said_as_they_are() -> None:
    rows = [{"prompt": "a", "completion": "b" * 20}, {"prompt": "a" * 30, "completion": "b"}]
    how = Tokenization.of(characters())

    def made(packing: bool = False, **settings: Any) -> tuple[list[int], str]:
        sft = LiftSFTConfig(use_cpu=True, bf16=False, max_length=10, packing=packing, **settings)
        found = token_rows(rows, how, cut=Cut.of(sft, packing))
        return [len(row["labels"]) for row in found.data], str(found.report)

    lengths, said = made()
    assert lengths == [10]
    assert "2 are longer than max_length=10 and are cut; 1 have no token to train on" in said
    with pytest.warns(FutureWarning, match="keep_end"):
        assert made(truncation_mode="keep_end")[0] == [10, 10]
    assert made(packing=True)[0] == [10]
    for strategy in ("bfd_split", "wrapped"):
        lengths, said = made(packing=True, packing_strategy=strategy)
        assert lengths == [22, 32]
        assert "are split over several packs" in said


def test_rows_that_train_no_end_token_are_counted_and_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    endless = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    how = Tokenization.of(characters(endless))
    found = token_rows(CHATS, how)
    assert found.report.unended == 2
    say(found.report, how)
    assert "no end token is trained: no train row has '</s>'" in caplog.text
    caplog.clear()
    for tokenizer, rows in KINDS.values():
        how = Tokenization.of(tokenizer)
        say(token_rows(rows, how).report, how)
    assert "no end token" not in caplog.text
    ends = Tokenization.of(
        characters(endless.replace("\n", "#")), ends=[characters().encode("#")[0]]
    )
    assert token_rows(CHATS, ends).report.unended == 0  # the base's own second end token


def test_several_processes_make_the_same_tokens_and_errors() -> None:
    how = Tokenization.of(characters(CHATML))
    rows = CHATS * 6
    assert list(token_rows(rows, how, workers=2).data) == list(token_rows(rows, how).data)
    with pytest.raises(UserError, match="with the id"):
        token_rows(rows, Tokenization.of(characters(CHATML), rows=50), workers=2)
