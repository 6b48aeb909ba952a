"""Rows are what is in a file, whatever its form; what is no row is one clear sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chats import ROWS, write
from datasets import Dataset

from leanlift import UserError
from leanlift.rows.source import as_dataset, load_rows, plain_rows


def present(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value is not None}


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_rows_are_what_is_in_the_file(tmp_path: Path, suffix: str) -> None:
    data = load_rows(str(write(tmp_path / f"rows{suffix}", ROWS)))
    for rows in (data, data.select(range(len(data))), as_dataset(ROWS)):
        found = list(plain_rows(rows))
        assert json.dumps(found) == json.dumps([present(row) for row in ROWS])
    assert set(data.column_names) == {"messages", "n", "id", "tools"}


def test_flat_rows_are_an_ordinary_dataset(tmp_path: Path) -> None:
    rows = [{"prompt": "1", "completion": "2", "n": i, "input_ids": [i]} for i in range(3)]
    data = load_rows(str(write(tmp_path / "rows.jsonl", rows)))
    assert data.format["type"] is None
    assert list(data) == rows


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(10)),
        ("train[:2]", range(2)),
        ("train[7:]", range(7, 10)),
        ("train[-1:]", range(9, 10)),
        ("train[10%:30%]", range(1, 3)),
        ("train[:1]+train[9:]", [0, 9]),
    ],
)
def test_slices_of_a_file(tmp_path: Path, split: str, expected: Any) -> None:
    rows = [{"text": f"row {i}"} for i in range(10)]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    paths = [
        write(tmp_path / "rows.json", rows),
        write(tmp_path / "rows.jsonl", rows),
        tmp_path / "rows.parquet",
    ]
    for path in paths:
        assert list(load_rows(str(path), split)) == [rows[i] for i in expected]


def test_splits_that_a_file_has_not(tmp_path: Path) -> None:
    path = str(write(tmp_path / "rows.jsonl", [{"text": "a"}]))
    for split in ("validation", "test", "train[", "train[:x]", "train+test"):
        with pytest.raises(UserError, match="is a file, which is one split called train"):
            load_rows(path, split)
    with pytest.raises(UserError, match="leaves none of the 1 rows"):
        load_rows(path, "train[1:]")
    for split in ("test", "train", "test[:1]"):  # the default for rows to evaluate on
        assert len(load_rows(path, split, "eval")) == 1


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b'{"text": "a"}\n{"text": ', "line 2 is no JSON"),
        (b'{"text": "a"}\n[1]\n', r"row 1 of .* is 1: expected an object"),
        (b"3\n", "row 0 of .* is 3"),
        (b'{"text": "\xff"}\n', "is not UTF-8"),
    ],
    ids=["cut-off", "list", "number", "latin-1"],
)
def test_files_that_hold_something_else(tmp_path: Path, text: bytes, match: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text)
    with pytest.raises(UserError, match=match):
        load_rows(str(path))


def test_forms_of_json_that_are_taken(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "b"}]
    forms = {
        "list.json": json.dumps(rows),
        "pretty.json": json.dumps(rows, indent=4),
        "lines.json": "\n".join(map(json.dumps, rows)),
        "texts.json": '["a", "b"]',
        "mark.jsonl": "\ufeff" + "\n".join(map(json.dumps, rows)),
        "gaps.jsonl": "\n\n".join(map(json.dumps, rows)) + "\r\n \n",
    }
    for name, text in forms.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert list(load_rows(str(tmp_path / name))) == rows, name


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_local_files(tmp_path: Path, suffix: str) -> None:
    rows = [{"prompt": str(i), "completion": "x"} for i in range(3)]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        Dataset.from_list(rows).to_parquet(path)
    assert list(load_rows(str(path))) == rows


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_rows(str(tmp_path / "none.jsonl"))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "comp')
    with pytest.raises(UserError, match="cannot be read as rows"):
        load_rows(str(broken))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(UserError, match=r"empty\.jsonl"):
        load_rows(str(empty))
    other = tmp_path / "rows.xml"
    other.write_text("a,b\n")
    with pytest.raises(UserError, match="is no data file"):
        load_rows(str(other))
    with pytest.raises(UserError, match="cannot be read as rows"):
        load_rows("nobody/no-such-dataset")
