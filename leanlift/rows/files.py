"""Files of rows: which kinds there are, and the rows of those that are text.

JSON and JSONL are read here because Arrow would not give their values back as they are (see
`rows/source.py`), CSV and TSV because pandas, which `datasets` reads them with, guesses: 007 would
be a 7, and NA nothing. A cell is the text that stands there; one that holds a chat as JSON is the
chat. A file of plain text is one row, whole: what becomes of it is the tokenizer's affair
(`data/windows.py`). Parquet is left to `datasets`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from leanlift.errors import UserError, first_line

LINES = (".jsonl", ".ndjson")
"""Endings of files with a row in each line."""

CELLS = {".csv": ",", ".tsv": "\t"}
"""Endings of files with cells, and what stands between these."""

TEXTS = (".txt", ".md")
"""Endings of files of plain text."""

DOCUMENT = "document text"
"""The one column of such a file: its text. No column of anybody's has a name like this."""

FILE_TYPES = {
    ".json": "json",
    **dict.fromkeys(LINES, "json"),
    **dict.fromkeys(CELLS, "csv"),
    **dict.fromkeys(TEXTS, "text"),
    ".parquet": "parquet",
}

LARGEST_CELL = 2**31 - 1

Row = dict[str, Any]


def check_place(source: str) -> tuple[Path, str | None]:
    """The path of a source of rows, and what kind of file it is; None: a name on the hub.

    Raises:
        UserError: there is no such file, or it is of another kind.
    """
    path = Path(source).expanduser()
    kind = FILE_TYPES.get(path.suffix.lower())
    wanted = "a JSON, JSONL, CSV, TSV or Parquet file of rows, or a text"
    if kind and not path.is_file():
        raise UserError(f"{source} does not exist: expected {wanted}.")
    if not kind and path.is_file():
        raise UserError(
            f"{source} is no data file: expected .json, .jsonl, .csv, .tsv, .parquet, .txt or .md."
        )
    looks_like_a_path = path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1
    if not kind and looks_like_a_path and not path.is_dir():
        raise UserError(
            f"there is no file or directory {source}: expected {wanted}, or a dataset's name on "
            "the hub."
        )
    return path, kind


def is_read_here(kind: str | None) -> bool:
    """Whether `read_rows` takes a kind of file."""
    return kind in ("json", "csv", "text")


def is_document(columns: Collection[str] | None) -> bool:
    """Whether rows of these columns are the text of a file."""
    return list(columns or ()) == [DOCUMENT]


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSON, JSONL, CSV or TSV file, or the one of a text.

    Raises:
        UserError: it cannot be read as such.
    """
    ending = path.suffix.lower()
    read = _read_cells if ending in CELLS else _read_text if ending in TEXTS else _read_json
    try:
        yield from read(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read as rows: it is not UTF-8 ({error}).") from None


# --- plain text -----------------------------------------------------------------------------


def _read_text(path: Path) -> Iterator[Row]:
    """A whole file, line ends as they are; none of one that holds nothing but blanks."""
    raw = path.read_bytes()
    if b"\0" in raw:
        raise UserError(
            f"{path} cannot be read as rows: it holds NUL bytes, as no text in UTF-8 does."
        )
    text = raw.decode("utf-8-sig")
    if text.strip():
        yield {DOCUMENT: text}


# --- JSON -----------------------------------------------------------------------------------


def _read_json(path: Path) -> Iterator[Row]:
    """Objects of a JSON list, or one after the other as in JSONL; a text becomes a `text` row."""
    number = 0
    lines = path.suffix.lower() in LINES
    for value in _json_lines(path) if lines else _json_values(path):
        for row in value if isinstance(value, list) else [value]:
            row = {"text": row} if isinstance(row, str) else row
            if not isinstance(row, dict):
                raise UserError(
                    f"row {number} of {path} is {row!r:.80}: expected an object such as "
                    '{"prompt": "…", "completion": "…"}.'
                )
            yield row
            number += 1


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(
                        f"{path} cannot be read as rows: line {number} is no JSON: "
                        f"{first_line(error)}"
                    ) from None


def _json_values(path: Path) -> Iterator[Any]:
    """The values of a file, whose lines need not be values of their own."""
    text, decoder, at = path.read_text(encoding="utf-8-sig"), json.JSONDecoder(), 0
    while True:
        while at < len(text) and text[at].isspace():
            at += 1
        if at == len(text):
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be read as rows: {first_line(error)}") from None
        yield value


# --- cells ----------------------------------------------------------------------------------


def _read_cells(path: Path) -> Iterator[Row]:
    csv.field_size_limit(LARGEST_CELL)  # its own bound is the size of a long document
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, delimiter=CELLS[path.suffix.lower()], strict=True)
        try:
            header = next(lines, [])
            _check_header(header, path)
            for cells in lines:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise UserError(
                        f"{path} cannot be read as rows: line {lines.line_num} has {len(cells)} "
                        f"cells, and the header has {len(header)}."
                    )
                yield dict(zip(header, map(_cell, cells), strict=True))
        except csv.Error as error:
            raise UserError(
                f"{path} cannot be read as rows: line {lines.line_num}: {first_line(error)}."
            ) from None


def _check_header(header: list[str], path: Path) -> None:
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise UserError(
            f"{path} cannot be read as rows: its first line, which names the columns, has "
            f"{twice!r} twice."
        )


def _cell(text: str) -> Any:
    """A chat that a cell holds as JSON; else its text."""
    if text.lstrip().startswith("["):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return text
        if value and all(isinstance(turn, dict) and {"role", "from"} & set(turn) for turn in value):
            return value
    return text
