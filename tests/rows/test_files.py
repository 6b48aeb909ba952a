"""Cells of CSV and TSV are the texts that stand there; what is wrong with a file is a sentence."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from chats import ANSWER, ROWS, USER, write

from leanlift import UserError
from leanlift.rows.files import DOCUMENT, FILE_TYPES, check_place, is_document, read_rows
from leanlift.rows.files import TEXTS as TEXTS_ENDINGS
from leanlift.rows.first import check_first_rows
from leanlift.rows.mixture import load_mixture, parts_of
from leanlift.rows.source import load_rows, stream_rows

TEXTS = [
    "007",
    "1e5",
    "NA",
    "null",
    "True",
    " a ",
    "é",
    'say "no"',
    "two\nlines",
    "a,b\tc",
    "[1]",
    "",
]
"""What a reader that guesses would make something else of."""


def cells(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        lines.writerow(rows[0])
        lines.writerows(row.values() for row in rows)
    return path


@pytest.mark.parametrize("name", ["rows.csv", "rows.TSV"])
def test_a_cell_is_the_text_that_stands_there(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": f"q{n}", "completion": text} for n, text in enumerate(TEXTS)]
    path = cells(tmp_path / name.lower(), rows).rename(tmp_path / name)
    assert list(load_rows(str(path))) == rows
    assert list(stream_rows(str(path))) == rows


def test_a_cell_may_hold_a_chat(tmp_path: Path) -> None:
    tools = json.dumps([{"name": "f"}])
    row = {"messages": json.dumps([USER, ANSWER]), "tools": tools, "id": '[{"a": 1}]'}
    rows = load_rows(str(cells(tmp_path / "rows.csv", [row])))
    assert list(rows) == [{"messages": [USER, ANSWER], "tools": tools, "id": '[{"a": 1}]'}]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2,3\n", "line 2 has 3 cells, and the header has 2"),
        ("a,b\n1,2\n3\n", "line 3 has 1 cells, and the header has 2"),
        ("a,a\n1,2\n", "has 'a' twice"),
        ('a,b\n"1,2\n', "line 2: unexpected end of data"),
        ("a,b\n", "holds no rows"),
        ("", "holds no rows"),
    ],
)
def test_cells_that_are_no_rows(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text)
    for read in (load_rows, stream_rows):
        with pytest.raises(UserError, match=said):
            list(read(str(path)))


def test_a_file_in_another_encoding_and_of_another_kind(tmp_path: Path) -> None:
    for ending, kind in FILE_TYPES.items():
        path = tmp_path / f"rows{ending}"
        with pytest.raises(UserError, match=r"rows\.\w+ does not exist"):
            check_place(str(path))
        path.write_bytes("a\né".encode("utf-16"))
        with pytest.raises(UserError, match="cannot be read as rows"):
            list(load_rows(str(path)))
        assert check_place(str(path)) == (path, kind)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_stream_of_json_has_the_rows_as_they_are(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, ROWS)
    assert list(read_rows(path)) == ROWS
    assert list(stream_rows(str(path))) == ROWS


def test_a_stream_of_a_file_has_no_parts(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(UserError, match=r"'train\[:2\]' asks for one: leave streaming out"):
        stream_rows(str(path), "train[:2]")


# --- plain text -------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", TEXTS_ENDINGS)
def test_a_text_is_one_row_as_it_stands(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending.upper()}"
    path.write_bytes("\ufeffeins\r\n\r\n zwei: é\n".encode())
    rows = load_rows(str(path))
    assert is_document(rows.column_names)
    assert list(rows) == [{DOCUMENT: "eins\r\n\r\n zwei: é\n"}]
    assert list(load_rows(str(path), "test", "eval")) == list(rows)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no rows"),
        (b" \n\t\n", "holds no rows"),
        (b"a\0b", "holds NUL bytes"),
        ("é".encode("latin-1"), "is not UTF-8"),
        (b"\x89PNG\r\n\x1a\n", "is not UTF-8"),
    ],
)
def test_texts_that_are_none(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    for read in (load_rows, lambda source: check_first_rows(source, "eval")):
        with pytest.raises(UserError, match=said):
            read(str(path))


def test_what_counts_rows_refuses_a_text(tmp_path: Path) -> None:
    path, rows = tmp_path / "a.txt", write(tmp_path / "rows.jsonl", ROWS)
    path.write_text("a text")
    with pytest.raises(UserError, match="leave streaming out"):
        stream_rows(str(path))
    with pytest.raises(UserError, match="asks for a part"):
        load_rows(str(path), "train[:3]")
    with pytest.raises(UserError, match="dpo takes no texts"):
        check_first_rows(str(path), "train", method="dpo")
    mixed = [{"path": str(path), "fraction": 1}, {"path": str(rows), "fraction": 1}]
    with pytest.raises(UserError, match="a fraction counts rows"):
        load_mixture(parts_of(mixed))
