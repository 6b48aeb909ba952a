"""Images among rows: which column has them, and where the files are that it names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

COLUMNS = ("images", "image")
"""A list of images, or one; as TRL calls them."""

Row = dict[str, Any]


def image_column(columns: Iterable[str]) -> str | None:
    """The column of images among columns; None: there is none."""
    known = set(columns)
    return next((name for name in COLUMNS if name in known), None)


def with_places(rows: Iterable[Row], directory: Path) -> Iterator[Row]:
    """Rows of a file, the images that they name beside it by whole paths; what is no file there
    stays as it is."""
    for row in rows:
        column = image_column(row)
        yield row if column is None else {**row, column: _placed(row[column], directory)}


def stored_with_places(rows: Any, directory: Path) -> Any:
    """A `Dataset` of a file, likewise; a column that holds images themselves stays as it is."""
    column = image_column(rows.column_names)
    if column is None:
        return rows
    held = rows.with_format("arrow")[:].column(column)
    if not all(map(_names_files, held.chunks)):
        return rows
    placed = [_placed(_path(value), directory) for value in held.to_pylist()]
    return rows.remove_columns(column).add_column(column, placed)


def _names_files(values: Any) -> bool:
    """Whether an array of Arrow's is of paths, or lists of them, and of no bytes."""
    while "list" in str(values.type).split("<")[0]:
        values = values.flatten()
    kind = str(values.type)
    if kind.startswith("struct<") and {"bytes", "path"} == {field.name for field in values.type}:
        return bool(values.field("bytes").null_count == len(values))
    return kind in ("string", "large_string")


def _path(value: Any) -> Any:
    """What Arrow holds of an image in a file, as JSON has it."""
    if isinstance(value, list):
        return [_path(each) for each in value]
    return value["path"] if isinstance(value, dict) else value


def _placed(value: Any, directory: Path) -> Any:
    if isinstance(value, list):
        return [_placed(each, directory) for each in value]
    if not isinstance(value, str) or len(value) > 1024 or "\0" in value:
        return value
    path = directory / Path(value).expanduser()
    return str(path.absolute()) if path.is_file() else value


def placeholders(turns: Any) -> int:
    """How many places for images a chat has."""
    return sum(
        part.get("type") == "image"
        for turn in turns
        for part in (turn["content"] if isinstance(turn.get("content"), list) else ())
    )


def with_placeholders(turns: list[Row], count: int) -> list[Row]:
    """A chat whose contents are lists of parts; where it has no place for an image, `count` of them
    stand before its first user's text."""
    missing = 0 if placeholders(turns) else count
    made = []
    for turn in turns:
        if isinstance(turn.get("content"), str):
            parts: list[Row] = [{"type": "text", "text": turn["content"]}]
            if turn["role"] == "user" and missing:
                parts, missing = [{"type": "image"}] * missing + parts, 0
            turn = {**turn, "content": parts}
        elif isinstance(turn.get("content"), list) and turn["role"] == "user" and missing:
            turn = {**turn, "content": [{"type": "image"}] * missing + turn["content"]}
            missing = 0
        made.append(turn)
    return made


def texts_of(example: Row) -> list[str]:
    """The texts in the turns of a chat's prompt, completion or messages."""
    turns = [turn for held in example.values() if isinstance(held, list) for turn in held]
    contents = [turn.get("content") for turn in turns if isinstance(turn, dict)]
    parts = [part for each in contents if isinstance(each, list) for part in each]
    texts = [part.get("text") for part in parts] + contents
    return [text for text in texts if isinstance(text, str)]


def text_alone(row: Row) -> Row:
    """A row without its images, and without the places for them."""
    found = {key: value for key, value in row.items() if key not in COLUMNS}
    for key, value in found.items():
        if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
            found[key] = [_without_places(turn) for turn in value]
    return found


def _without_places(turn: Row) -> Row:
    content = turn.get("content")
    if not isinstance(content, list):
        return turn
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("text")]
    return {**turn, "content": "".join(map(str, texts))}
