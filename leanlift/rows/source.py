"""Rows as they are in their file, whatever Arrow makes of them.

A column of a `Dataset` has one Arrow type. JSON has none: two tools take different arguments, a
content is a text here and null there. Arrow unites such structs, and what a row lacks comes back
as null, which a chat template then prints. So text files are read by us (`rows/files.py`), and a
column whose values Arrow would not give back as they were is kept as JSON text and decoded row by
row (`datasets`' own Json type reads floats inexactly, and what has a large number in it as text).
Of rows that came as Arrow structs (Parquet, the hub, a user's own `Dataset`) a null inside a struct
is taken for a missing key. A stream of a text file has no types: its rows are what they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanlift.errors import UserError, first_line
from leanlift.rows.files import Row, check_place, is_read_here, read_rows
from leanlift.rows.images import stored_with_places, with_places
from leanlift.rows.turns import is_unicode

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

__all__ = ["Row", "check_place", "load_rows", "stream_rows"]


def load_rows(
    source: str, split: str = "train", name: str = "train", config: str | None = None
) -> Dataset:
    """Rows from a local JSON, JSONL, CSV, TSV or Parquet file, or from a dataset's hub name; a text
    file is one row, `DOCUMENT`.

    Args:
        source: a path, or a hub name.
        split: as `datasets` has it, slices included. A file is one split, called "train", or by
            `name`'s default.
        name: "train" or "eval", what the rows are for.
        config: of a dataset on the hub that has several.

    Raises:
        UserError: missing, unreadable or empty, or no such split.
    """
    import datasets

    path, kind = check_place(source)
    if kind == "text" and "[" in split:
        raise UserError(f"{source} is one text, and {split!r} asks for a part of its rows.")
    with _in_a_sentence(source, path, kind):
        if is_read_here(kind):
            rows = as_dataset(with_places(read_rows(path), path.parent))
        elif kind:
            rows = datasets.load_dataset(kind, data_files=str(path), split="train")
            rows = stored_with_places(rows, path.parent)
        else:
            rows = datasets.load_dataset(source, config, split=split)
    if len(rows) == 0:
        raise UserError(f"{source} holds no rows: there is nothing to train on.")
    return _part(rows, source, split, name) if kind else rows


def stream_rows(source: str, split: str = "train", config: str | None = None) -> IterableDataset:
    """As `load_rows`, read as they are asked for.

    Raises:
        UserError: as there; or a part of a file, whose rows nobody has counted; or a text.
    """
    import datasets

    path, kind = check_place(source)
    if kind == "text":
        raise UserError(f"{source} is one text, which is read as a whole: leave streaming out.")
    if kind and split != "train":
        raise UserError(
            f"{source} is a file that is read as a stream, whose parts nobody knows, and {split!r} "
            "asks for one: leave streaming out, or the split."
        )
    with _in_a_sentence(source, path, kind):
        if is_read_here(kind):
            rows = datasets.IterableDataset.from_generator(
                _placed_rows, gen_kwargs={"path": str(path)}
            )
        elif kind:
            files = str(path)
            rows = datasets.load_dataset(kind, data_files=files, split="train", streaming=True)
        else:
            rows = datasets.load_dataset(source, config, split=split, streaming=True)
        first = next(iter(rows), None)
    if first is None:
        raise UserError(f"{source} holds no rows: there is nothing to train on.")
    return rows


def _placed_rows(path: str) -> Iterator[Row]:
    yield from with_places(read_rows(Path(path)), Path(path).parent)


@contextmanager
def _in_a_sentence(source: str, path: Path, kind: str | None) -> Iterator[None]:
    """What any backend says of rows that it cannot read."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each backend raises its own kinds
        cause = _cause(error)
        if isinstance(cause, UserError):
            raise cause from None
        if kind or path.is_dir():
            raise UserError(f"{source} cannot be read as rows: {first_line(cause)}") from error
        raise UserError(
            f"there is no file or directory {source}, and as a dataset's name on the hub it cannot "
            f"be read as rows: {first_line(cause)}"
        ) from error


def _part(rows: Dataset, source: str, split: str, name: str) -> Dataset:
    """The part of a file's rows that a split such as train[:100] asks for."""
    import datasets

    called = "test" if split.startswith("test") and name == "eval" else "train"
    try:
        wanted = datasets.ReadInstruction.from_spec(split).to_absolute({called: len(rows)})
        parts = [(part.from_ or 0, len(rows) if part.to is None else part.to) for part in wanted]
    except (ValueError, AssertionError, KeyError) as error:
        raise UserError(
            f"{source} is a file, which is one split called {called} with {len(rows)} rows, and "
            f"{split!r} asks for something else: expected {called}, or a slice such as "
            f"{called}[:100] or {called}[10%:]."
        ) from error
    chosen = [number for start, stop in parts for number in range(start, stop)]
    if not chosen:
        raise UserError(f"{split!r} leaves none of the {len(rows)} rows of {source}.")
    return rows if chosen == list(range(len(rows))) else rows.select(chosen)


def _cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def as_dataset(rows: Iterable[Row]) -> Dataset:
    """A `Dataset` that gives plain rows back as they are, but for columns that a row lacks: None.

    Raises:
        UserError: a row that is no dict, or holds what JSON has no form for.
    """
    columns: dict[str, list[Any]] = {}
    kinds: dict[str, set[str]] = {}
    count = 0
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"row {number} is a {type(row).__name__}: expected a dict of columns.")
        for column, value in row.items():
            held = columns.setdefault(column, [])
            held.extend([None] * (number - len(held)))
            kind = _kind(value)
            kinds.setdefault(column, set()).add(kind)
            held.append(_as_json(value, column, number) if kind == "json" else value)
        count = number + 1
    encoded = []
    for column, held in columns.items():
        held.extend([None] * (count - len(held)))
        found = kinds[column] - {"null"}
        if "json" in found or len(found) > 1:
            encoded.append(column)
            columns[column] = [
                value if value is None or isinstance(value, _Json) else json.dumps(value)
                for value in held
            ]
    from datasets import Dataset

    if not columns:
        return Dataset.from_list([{}] * count)
    result = Dataset.from_dict(columns)
    return result.with_transform(DecodeJson(encoded)) if encoded else result


def _kind(value: Any) -> str:
    """How Arrow can hold a value: "null", a scalar's type, "ids", or "json" for all else."""
    if value is None:
        return "null"
    if type(value) is str:
        return "str" if is_unicode(value) else "json"
    if type(value) in (bool, float):
        return type(value).__name__
    if type(value) is int:
        return "int" if -(2**63) <= value < 2**63 else "json"
    plain = type(value) is list and value and all(type(item) is int for item in value)
    return "ids" if plain and all(-(2**63) <= item < 2**63 for item in value) else "json"


def is_uniform(rows: Sequence[Row]) -> bool:
    """Whether Arrow gives rows back as they are: all of one structure, keys in one order."""
    forms = {_structure(row) for row in rows}
    return len(forms) == 1 and None not in forms


def _structure(value: Any) -> Any:
    """Types all the way down, hashable; None where a list holds more than one."""
    if isinstance(value, dict):
        inner = tuple((key, _structure(item)) for key, item in value.items())
        return None if any(form is None for _, form in inner) else inner
    if isinstance(value, list):
        found = {_structure(item) for item in value}
        return None if len(found) > 1 or None in found else ("list", *found)
    kind = _kind(value)
    return None if kind in ("json", "null") else kind


class _Json(str):
    """Text that is JSON already, among values of a column that are not."""

    __slots__ = ()


def _as_json(value: Any, column: str, number: int) -> _Json:
    try:
        return _Json(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"row {number} has a value in {column!r} that JSON has no form for: {first_line(error)}"
        ) from None


class DecodeJson:
    """The transform of a `Dataset` some of whose columns are JSON text."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = frozenset(columns)

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {
            column: [None if value is None else json.loads(value) for value in values]
            if column in self.columns
            else values
            for column, values in batch.items()
        }


def is_transformed(rows: Any) -> bool:
    """Whether a `Dataset` has a transform of the user's, which may give other rows each time."""
    form = rows.format
    return form["type"] == "custom" and not isinstance(
        form["format_kwargs"].get("transform"), DecodeJson
    )


def plain_rows(
    rows: Iterable[Row], lost: Callable[[int], object] = lambda number: None
) -> Iterator[Row]:
    """Each row as a template shall see it: columns and keys that it lacks are not there.

    Args:
        rows: a `Dataset` or stream, or plain dicts, which are taken as they are.
        lost: called with a row's number where a null was inside a tool or a tool's call and so
            could be a missing key as well as a null that is meant.
    """
    features = getattr(rows, "features", None) or {}
    structs = {column: feature for column, feature in features.items() if _has_struct(feature)}
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"row {number} is a {type(row).__name__}: expected a dict of columns.")
        found = {column: value for column, value in row.items() if value is not None}
        for column, feature in structs.items():
            if column in found:
                nulls: list[str] = []
                inside = column if column == "tools" else ""
                found[column] = _without_nulls(found[column], feature, nulls, inside)
                if nulls:
                    lost(number)
        yield found


def _has_struct(feature: Any) -> bool:
    if isinstance(feature, dict):
        return True
    inner = [feature[0]] if isinstance(feature, list) else [getattr(feature, "feature", None)]
    return inner[0] is not None and _has_struct(inner[0])


def _without_nulls(value: Any, feature: Any, nulls: list[str], inside: str = "") -> Any:
    """A value of Arrow structs without keys that are null, but for a turn's `content`."""
    if isinstance(feature, dict) and isinstance(value, dict):
        kept = {}
        for key, item in value.items():
            if item is None and key != "content":
                if inside:
                    nulls.append(inside)
                continue
            within = inside or ("tool_calls" if key == "tool_calls" else "")
            kept[key] = _without_nulls(item, feature.get(key), nulls, within)
        return kept
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    if inner is not None and isinstance(value, list):
        return [_without_nulls(item, inner, nulls, inside) for item in value]
    return value
