"""Rows of several places: each in its own shape, so many of each as its share says."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from chats import ANSWER, USER, write
from datasets import Dataset, IterableDataset
from tokenizers_of_all_kinds import CHATML, characters
from trl import SFTConfig

from leanlift import UserError
from leanlift.data.dataset import calibration_batches
from leanlift.data.ready import RowsForTraining
from leanlift.rows.mixture import Part, load_mixture, parts_of


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """Thirty chats, twenty instructions, ten texts; each row says its number."""
    chats = [{"messages": [USER, {**ANSWER, "content": f"chat {n}"}]} for n in range(30)]
    cells = [("instruction", "output", "id")] + [("q", f"cell {n}", n) for n in range(20)]
    with (tmp_path / "b.csv").open("w", newline="") as file:
        csv.writer(file).writerows(cells)
    Dataset.from_list([{"text": f"text {n}"} for n in range(10)]).to_parquet(tmp_path / "c.parquet")
    return {
        "chat": str(write(tmp_path / "a.jsonl", chats)),
        "cell": str(tmp_path / "b.csv"),
        "text": str(tmp_path / "c.parquet"),
    }


def ready(**more: Any) -> tuple[Any, RowsForTraining]:
    tokenizer = characters(CHATML)
    sft = SFTConfig(output_dir="o", report_to="none", use_cpu=True, bf16=False, **more)
    return tokenizer, RowsForTraining(tokenizer, sft)


def mixed(parts: list[dict[str, Any]], streaming: bool = False, **more: Any) -> tuple[Any, list]:
    """What is made of the parts, and the trained texts."""
    tokenizer, rows = ready(**more)
    made = rows.train(load_mixture(parts_of(parts), streaming))
    data = made if streaming else made.data
    texts = [tokenizer.decode([t for t in row["labels"] if t != -100]) for row in data]
    return made, [text.strip().removesuffix("</s>") for text in texts]


def counts(texts: list[str]) -> dict[str, int]:
    return dict(Counter(text.split()[0] for text in texts))


def test_without_shares_all_rows_are_taken(places: dict[str, str]) -> None:
    made, texts = mixed([{"path": path} for path in places.values()])
    assert counts(texts) == {"chat": 30, "cell": 20, "text": 10}
    assert made.report.rows == 60
    assert made.report.longest == max(len(row["input_ids"]) for row in made.data)
    assert made.report.unended == 0
    assert made.report.notes == ("b.csv: columns not used: id",)


@pytest.mark.parametrize(
    ("fractions", "expected"),
    [
        ((1, 1, 1), {"chat": 10, "cell": 10, "text": 10}),
        ((0.5, 0.25, 0.25), {"chat": 20, "cell": 10, "text": 10}),
        ((3, 20, 1), {"chat": 3, "cell": 20, "text": 1}),
    ],
)
def test_shares_take_the_first_rows_and_none_twice(
    places: dict[str, str], fractions: tuple[float, ...], expected: dict[str, int]
) -> None:
    pairs = zip(places.values(), fractions, strict=True)
    _, texts = mixed([{"path": path, "fraction": share} for path, share in pairs])
    assert counts(texts) == expected
    assert texts[:3] == ["chat 0", "chat 1", "chat 2"]
    assert len(set(texts)) == len(texts)


def test_streams_are_drawn_by_their_shares(places: dict[str, str]) -> None:
    parts = [{"path": places["chat"], "fraction": 3}, {"path": places["cell"], "fraction": 1}]
    made, texts = mixed(parts, streaming=True)
    assert isinstance(made, IterableDataset)
    found = counts(texts)
    assert 2 < found["chat"] / found["cell"] < 5
    assert texts != sorted(texts), "one after the other"
    assert mixed(parts, streaming=True)[1] == texts
    assert mixed(parts, streaming=True, seed=7)[1] != texts


def test_streams_without_shares_follow_each_other(
    places: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    _, texts = mixed([{"path": path} for path in places.values()], streaming=True)
    assert [text.split()[0] for text in texts] == ["chat"] * 30 + ["cell"] * 20 + ["text"] * 10
    assert "a.jsonl, b.csv, c.parquet come one after the other" in caplog.text


def test_a_part_may_be_a_slice_or_some_columns(places: dict[str, str]) -> None:
    parts = [{"path": places["chat"], "split": "train[5:7]"}, {"path": places["text"]}]
    assert mixed(parts)[1][:3] == ["chat 5", "chat 6", "text 0"]
    wanted = ["instruction", "output"]
    made, _ = mixed([{"path": places["cell"], "columns": wanted}, {"path": places["text"]}])
    assert made.report.notes == ()
    with pytest.raises(UserError, match=r"b\.csv has no column 'reply': it has"):
        load_mixture(parts_of([{"path": places["cell"], "columns": ["reply"]}]))


def test_one_part_is_no_mixture(places: dict[str, str]) -> None:
    rows = load_mixture((Part(places["text"], fraction=0.1),))
    assert isinstance(rows, Dataset)
    assert len(rows) == 10


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"weight": 2}, "unknown key 'weight': did you mean fraction?"),
        ({"spilt": "a"}, "did you mean split?"),
        ({"nonsense": 1}, "expected path, name, split, columns, fraction"),
        ({"path": 3}, "entry 1 of datasets has no text as its path"),
        ({"path": None}, "no text as its path"),
        ({"split": ""}, "no text as its split"),
        ({"columns": "a"}, "'a' as columns: expected a list of names"),
        *(({"fraction": x}, "expected a number above 0") for x in (0, -1, True, "a", float("nan"))),
        ({"fraction": 1}, r"a fraction for rows\.json, and none for others"),
    ],
)
def test_parts_that_cannot_be(part: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parts_of([{"path": "first.json"}, {"path": "rows.json", **part}])


def test_a_share_that_leaves_nothing(places: dict[str, str]) -> None:
    parts = [{"path": places["chat"], "fraction": 1000}, {"path": places["text"], "fraction": 1}]
    with pytest.raises(UserError, match=r"a fraction of 1 leaves no row of .*c\.parquet"):
        load_mixture(parts_of(parts))


def test_parts_that_are_tokenized_differently(places: dict[str, str], tmp_path: Path) -> None:
    packed = tmp_path / "packed.parquet"
    rows = [{"input_ids": [5, 6, 1], "labels": [5, 6, 1], "seq_lengths": [3]}]
    Dataset.from_list(rows).to_parquet(packed)
    with pytest.raises(UserError, match=r"a\.jsonl and of packed\.parquet are not tokenized alike"):
        mixed([{"path": places["chat"]}, {"path": str(packed)}])


def test_what_is_wrong_names_the_place(places: dict[str, str], tmp_path: Path) -> None:
    other = write(tmp_path / "o.jsonl", [{"prompt": 1, "completion": "a"}])
    with pytest.raises(UserError, match=r"row 0 of the train \(o\.jsonl\) dataset has 1"):
        mixed([{"path": places["chat"]}, {"path": str(other)}])


@pytest.mark.parametrize(
    ("settings", "works"),
    [
        ({"gradient_accumulation_steps": 5}, True),
        ({"gradient_accumulation_steps": 6}, False),
        ({"packing": True, "max_length": 20}, True),
        ({"packing": True, "max_length": 70}, True),
        ({"packing": True, "max_length": 70, "gradient_accumulation_steps": 2}, False),
    ],
)
def test_a_stream_shorter_than_a_step_is_refused(settings: dict[str, Any], works: bool) -> None:
    """Trainer would begin it again and again, and apply no step."""
    _, rows = ready(
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, **settings}
    )
    stream = IterableDataset.from_generator(lambda: ({"text": "nine tkns"} for _ in range(10)))
    if works:
        rows.train(stream)
        rows.eval(stream)
    else:
        with pytest.raises(UserError, match=r"a stream of 10 examples.* and a step takes"):
            rows.train(stream)


def test_gradients_are_gathered_over_the_first_of_a_stream() -> None:
    tokenizer, rows = ready()
    made = rows.train(IterableDataset.from_generator(lambda: ({"text": "abc"} for _ in range(99))))
    batches = calibration_batches(made, tokenizer, None, 3)
    assert [batch["input_ids"].shape for batch in batches] == [(1, 4)] * 3
