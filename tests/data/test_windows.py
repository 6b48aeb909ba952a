"""Texts of any length: every token but the first is predicted once, whatever the windows."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st
from sweeps import swept
from tiny import load
from tokenizers_of_all_kinds import CHATML, characters, merging, wrapping

from leanlift import UserError
from leanlift.data.dataset import token_rows, tokenized
from leanlift.data.lengths import Cut
from leanlift.data.ready import RowsForTraining
from leanlift.data.tokens import Tokenization
from leanlift.data.windows import WINDOW, window_length, windows
from leanlift.evaluation.answers import losses_of
from leanlift.evaluation.evaluate import to_samples
from leanlift.rows.source import load_rows
from leanlift.training import LiftSFTConfig

TEXT = "It is so: it is it.\n\nSo it is, and so it was. " * 9
KINDS: dict[str, Callable[[], Any]] = {
    "plain": characters,
    "chat": lambda: characters(CHATML),
    "start": wrapping,
    "end": lambda: wrapping(start=False, end=True),
    "both": lambda: wrapping(end=True),
    "merging": merging,
}


@examples(60)
@given(st.integers(0, 60), st.integers(0, 20))
def test_each_token_but_the_first_is_predicted_once(count: int, length: int) -> None:
    ids = list(range(count))
    found = windows(ids, length)
    assert [i for window in found for i in window[1:]] == ids[1:]
    assert all(len(window) <= max(2, length) for window in found)
    assert all(one[-1] == two[0] for one, two in pairwise(found))


@pytest.fixture
def text(tmp_path: Path) -> Any:
    path = tmp_path / "a.txt"
    path.write_text(TEXT, newline="")
    return load_rows(str(path))


@pytest.mark.parametrize("kind", swept(KINDS, "chat", "both"))
def test_nothing_is_put_into_a_text_but_a_start_token(text: Any, kind: str) -> None:
    tokenizer = KINDS[kind]()
    how = Tokenization.of(tokenizer)
    made = token_rows(text, how, cut=Cut(32)).data
    joined = [made["input_ids"][0][0], *(i for row in made["input_ids"] for i in row[1:])]
    starts = [tokenizer.bos_token_id] * (kind in ("start", "both"))
    assert joined == [*starts, *tokenizer(TEXT, add_special_tokens=False)["input_ids"]]
    assert tokenizer.eos_token_id not in joined
    assert list(made["labels"]) == list(made["input_ids"])
    assert max(map(len, made["input_ids"])) == 32
    again = [tokens.ids for _, _, tokens in tokenized(text, how, window=32)]
    assert again == list(made["input_ids"])


def test_a_start_token_that_the_text_has_is_not_doubled(tmp_path: Path) -> None:
    tokenizer = wrapping()
    for name, begin in (("a.txt", ""), ("b.txt", tokenizer.bos_token)):
        (tmp_path / name).write_text(f"{begin}abc")
    one, two = (
        token_rows(load_rows(str(tmp_path / name)), Tokenization.of(tokenizer)).data["input_ids"][0]
        for name in ("a.txt", "b.txt")
    )
    assert list(one) == list(two)


@torch.no_grad()
def test_the_loss_of_a_text_in_one_window_is_that_of_the_text(base: Path, text: Any) -> None:
    model, tokenizer = load(base, "dense").eval(), characters()
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    expected = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
    whole = to_samples(text, tokenizer, window=ids.shape[1])
    assert len(whole) == 1
    assert losses_of(model, whole, 1)[0] == pytest.approx(float(expected), rel=1e-5)
    parts = to_samples(text, tokenizer, window=40)
    assert sum(sample.trained for sample in parts) == ids.shape[1] - 1
    begin = ids[:, :40]
    first = F.cross_entropy(model(begin).logits[0, :-1], begin[0, 1:], reduction="sum")
    assert losses_of(model, parts, 4)[0] == pytest.approx(float(first), rel=1e-5)


def test_a_long_text_is_no_news(text: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = characters()
    tokenizer.model_max_length = 16
    with caplog.at_level(logging.WARNING):
        token_rows(text, Tokenization.of(tokenizer))
    assert caplog.text == ""


def test_windows_are_no_longer_than_the_base_has_positions(base: Path, tmp_path: Path) -> None:
    positions = load(base, "dense").config.max_position_embeddings
    assert window_length(str(base), 16) == 16
    assert window_length(str(base), 10**6) == positions
    assert window_length(str(base)) == min(WINDOW, positions)
    assert window_length(str(tmp_path)) == WINDOW
    assert window_length(str(tmp_path), 1) == 2


def test_a_text_is_trained_on_but_not_a_part_of_it(text: Any, tmp_path: Path) -> None:
    def ready(**more: Any) -> RowsForTraining:
        sft = LiftSFTConfig(output_dir=str(tmp_path), use_cpu=True, max_length=24, **more)
        return RowsForTraining(characters(), sft)

    made = ready().train(text)
    assert (made.report.longest, made.report.truncated) == (24, 0)
    count = len(characters()(TEXT)["input_ids"])
    assert len(made.data) == math.ceil((count - 1) / 23)
    with pytest.raises(UserError, match=r"is a text, and completion_only_loss"):
        ready(completion_only_loss=True).train(text)
