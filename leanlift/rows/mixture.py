"""Rows of several places, as TRL's DatasetMixtureConfig names them: `datasets`, a list of `path`,
`name`, `split`, `columns` and `fraction`.

Each place may have rows of another shape: they are converted one by one and mixed as tokens. A
`fraction` is the share that a place shall have of the mixture. As in TRL, shares are of one in sum
whatever they are given as, no row is taken twice, and the first rows of a place are those that are
taken. Streams, which TRL cannot mix by shares, are drawn from at random with them as probabilities,
until one has ended.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from leanlift.errors import UserError
from leanlift.rows.files import is_document
from leanlift.rows.source import load_rows, stream_rows


@dataclass(frozen=True)
class Part:
    """A place of rows.

    Attributes:
        path: a file, or a name on the hub.
        name: the configuration of a dataset on the hub that has several.
        split: as `datasets` has it.
        columns: those that are taken; None: all.
        fraction: the share of the mixture; None: all rows.
    """

    path: str
    name: str | None = None
    split: str = "train"
    columns: tuple[str, ...] | None = None
    fraction: float | None = None


@dataclass(frozen=True)
class Mixture:
    """Rows of several places, not yet mixed.

    Attributes:
        names: of the places, for messages.
        parts: their rows: each a `Dataset`, or each a stream.
        shares: probabilities with which rows of streams are drawn; None: one after the other.
    """

    names: tuple[str, ...]
    parts: tuple[Any, ...]
    shares: tuple[float, ...] | None = None


MEANT = {"weight": "fraction", "probability": "fraction", "data_files": "path", "config": "name"}
"""What other tools call the same."""

KEYS = tuple(field.name for field in fields(Part))


def parts_of(given: Sequence[Mapping[str, Any]], setting: str = "datasets") -> tuple[Part, ...]:
    """What a list of mappings, the value of a setting, names.

    Raises:
        UserError: keys that there are not, values that they cannot have, or shares of some alone.
    """
    found = tuple(_part(f"entry {number} of {setting}", each) for number, each in enumerate(given))
    with_share = [part.path for part in found if part.fraction is not None]
    if with_share and len(with_share) < len(found):
        raise UserError(
            f"datasets has a fraction for {with_share[0]}, and none for others: give one to each, "
            "or to none, which takes all rows."
        )
    return found


def _part(where: str, given: Mapping[str, Any]) -> Part:
    for key in given:
        if key not in KEYS:
            close = MEANT.get(str(key)) or next(
                iter(difflib.get_close_matches(str(key), KEYS, n=1)), None
            )
            hint = f"did you mean {close}?" if close else f"expected {', '.join(KEYS)}."
            raise UserError(f"{where} has an unknown key {key!r}: {hint}")
    values = {key: value for key, value in given.items() if value is not None}
    columns, fraction = values.get("columns"), values.get("fraction")
    texts = {key: values[key] for key in ("path", "name", "split") if key in values}
    wrong = next((key for key, text in texts.items() if not isinstance(text, str) or not text), "")
    if "path" not in values or wrong:
        raise UserError(f"{where} has no text as its {wrong or 'path'}.")
    if columns is not None:
        listed = isinstance(columns, (list, tuple)) and len(columns) > 0
        if not listed or not all(isinstance(name, str) for name in columns):
            raise UserError(f"{where} has {columns!r:.60} as columns: expected a list of names.")
        values["columns"] = tuple(columns)
    if values["path"].startswith("~"):
        values["path"] = os.path.expanduser(values["path"])
    number_like = isinstance(fraction, (int, float)) and not isinstance(fraction, bool)
    if fraction is not None and not (number_like and 0 < fraction < float("inf")):
        raise UserError(f"{where} has {fraction!r:.60} as fraction: expected a number above 0.")
    return Part(**values)


def load_mixture(parts: Sequence[Part], streaming: bool = False) -> Any:
    """The rows that parts name: of one part its `Dataset` or stream, of several a `Mixture`.

    Raises:
        UserError: rows that cannot be read, columns that are not there, a share so small that no
            row is left, or one of a text, which is a single row.
    """
    loaded = [rows_of(part, streaming) for part in parts]
    for part, rows in zip(parts, loaded, strict=True):
        if part.fraction is not None and is_document(rows.column_names):
            raise UserError(f"{part.path} is one text, and a fraction counts rows: leave it out.")
    shares = None
    if parts[0].fraction is not None and len(parts) > 1:
        total = sum(part.fraction or 0.0 for part in parts)
        shares = tuple((part.fraction or 0.0) / total for part in parts)
    if len(parts) == 1:
        return loaded[0]
    if shares is not None and not streaming:
        size = min(len(rows) / share for rows, share in zip(loaded, shares, strict=True))
        counts = [round(share * size) for share in shares]
        for part, count in zip(parts, counts, strict=True):
            if not count:
                raise UserError(
                    f"a fraction of {part.fraction:g} leaves no row of {part.path}: the others "
                    f"allow {size:.0f} rows in all."
                )
        loaded = [rows.select(range(count)) for rows, count in zip(loaded, counts, strict=True)]
        shares = None
    return Mixture(names_of(parts), tuple(loaded), shares)


def rows_of(part: Part, streaming: bool = False) -> Any:
    """The rows of one place, a `Dataset` or a stream.

    Raises:
        UserError: they cannot be read, or lack a column.
    """
    if streaming:
        rows: Any = stream_rows(part.path, part.split, part.name)
    else:
        rows = load_rows(part.path, part.split, config=part.name)
    if part.columns is None:
        return rows
    known = rows.column_names
    missing = [name for name in part.columns if known is not None and name not in known]
    if missing:
        raise UserError(f"{part.path} has no column {missing[0]!r}: it has {sorted(known)}.")
    return rows.select_columns(list(part.columns))


def names_of(parts: Sequence[Part]) -> tuple[str, ...]:
    """The last parts of paths where that tells them apart."""
    short = [Path(part.path).name for part in parts]
    return tuple(short if len(set(short)) == len(short) else [part.path for part in parts])
