"""Rows for TRL's trainers of preferences and rewards.

`rows_for` reads rows, holds each against what the method wants (`rows/preferences.py`) and gives a
`Dataset` that the trainer takes as it is. TRL tokenizes them itself, from Arrow's columns, where a
key that a turn lacks comes back as null. Whether that could be seen is tried: the chat template has
to make the same text of what Arrow gives back as of the row itself.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

from datasets import Dataset, IterableDataset

from leanlift.data.calls import as_taken, takes_texts
from leanlift.data.tokens import IGNORED, Tokenization, Tokens
from leanlift.errors import UserError, first_line
from leanlift.rows.examples import NULLS, ExampleReader, columns_of
from leanlift.rows.first import SFT
from leanlift.rows.mixture import Mixture
from leanlift.rows.preferences import METHODS, SAID, Method, PreferenceReader
from leanlift.rows.source import Row, as_dataset, is_uniform, load_rows, plain_rows
from leanlift.rows.turns import TEMPLATE_COLUMNS

logger = logging.getLogger("leanlift")

TRIED = 20
"""First rows that are put through the chat template."""


def rows_for(
    method: str, source: Any, *, name: str = "train", split: str = "train", tokenizer: Any = None
) -> Any:
    """What a trainer of TRL's takes for rows.

    Args:
        method: "sft" or one of `METHODS`.
        source: a file or hub name; a `Dataset`, stream or list of dicts; or a `Mixture`.
        name: "train" or "eval", for messages.
        split: of a file or a dataset on the hub.
        tokenizer: with the chat template that the rows will go through; without one, chats that
            Arrow does not give back as they are, are refused.

    Returns:
        A `Dataset`, or of a stream a stream, whose rows are looked at as they come. For "sft" the
        rows as they are: `RowsForTraining` converts them.

    Raises:
        UserError: no such method, rows of another kind, or rows that cannot be used.
    """
    if method != SFT and method not in METHODS:
        raise UserError(f"there is no method {method!r}: expected {', '.join((SFT, *METHODS))}.")
    rows = load_rows(source, split, name) if isinstance(source, str) else source
    if method == SFT:
        return _for_sft(rows, name)
    if isinstance(rows, IterableDataset):
        return _stream(rows, PreferenceReader(method, name, columns_of(rows)), tokenizer)
    places = [(name, rows)]
    if isinstance(rows, Mixture):
        parts = zip(rows.names, rows.parts, strict=True)
        places = [(f"{name} ({place})", part) for place, part in parts]
    made = [row for where, part in places for row in _all_of(method, part, where, tokenizer)]
    _check_alike(made, name)
    if any(isinstance(made[0].get(column), list) for column in SAID):
        _check_template(made[:TRIED], name, tokenizer)
    return _as_arrow(made, METHODS[method], name, tokenizer)


def previews(row: Row, how: Tokenization) -> dict[str, Tokens]:
    """How the texts of a row come out as tokens: each completion behind its prompt, a whole text,
    or a prompt alone, of which nothing is trained.

    Args:
        row: of `rows_for`, for another method than "sft".
        how: the tokenization.
    """
    options = {key: row[key] for key in TEMPLATE_COLUMNS if row.get(key)}
    if isinstance(options.get("tools"), str):
        options["tools"] = json.loads(options["tools"])
    found = {}
    for column in [column for column in SAID[1:] if row.get(column)] or ["prompt"]:
        said = row[column]
        example: Row = {"messages" if isinstance(said, list) else "text": said}
        if "prompt" in row and column != "prompt":
            example = {"prompt": row["prompt"], "completion": said}
        tokens = how({**example, **options}, f"the first row's {column}")
        if column == "prompt":
            tokens = tokens._replace(labels=[IGNORED] * len(tokens.ids))
        found[column] = tokens
    return found


def _for_sft(rows: Any, name: str) -> Any:
    """Rows as they are, whose columns are of a known shape."""
    for part in rows.parts if isinstance(rows, Mixture) else (rows,):
        columns = columns_of(part if not isinstance(part, (list, tuple)) else as_dataset(part))
        if "input_ids" not in columns:
            ExampleReader(name, columns, chat=True)
    return rows


def _all_of(method: str, rows: Any, name: str, tokenizer: Any) -> list[Row]:
    """The rows of one place as the trainer takes them; what they lost is logged.

    Raises:
        UserError: none is left.
    """
    if isinstance(rows, (list, tuple)):
        rows = as_dataset(rows)
    if not isinstance(rows, Dataset):
        raise UserError(
            f"the {name} dataset is a {type(rows).__name__}: expected a Dataset or a list of dicts"
            f"{', since streams are not mixed' if isinstance(rows, IterableDataset) else ''}."
        )
    reader = PreferenceReader(method, name, columns_of(rows))
    made = list(_read(rows, reader, tokenizer))
    lines = reader.lines(len(rows))
    if lines:
        loud = bool(reader.notes.found)
        (logger.warning if loud else logger.info)("%s: %s.", name, "; ".join(lines))
    if not made:
        raise UserError(
            f"no row of the {name} dataset leaves something to train on"
            f"{f': {lines[0]}' if lines else ''}."
        )
    return made


def _check_alike(rows: list[Row], name: str) -> None:
    """All texts or all chats, over several places too."""
    first = _form(rows[0])
    other = next((row for row in rows if _form(row) != first), None)
    if other is not None:
        raise UserError(
            f"the {name} datasets are of several forms, {_words(first)} and "
            f"{_words(_form(other))}: expected the same columns in all, and all of them texts or "
            "all of them chats."
        )


def _form(row: Row) -> dict[str, bool]:
    return {column: isinstance(row[column], list) for column in SAID if column in row}


def _words(form: dict[str, bool]) -> str:
    kind = "chats" if any(form.values()) else "texts"
    return f"{kind} in {', '.join(form)}"


def _check_template(rows: list[Row], name: str, tokenizer: Any) -> None:
    """Refuse chats that the chat template refuses, where there is a tokenizer.

    Raises:
        UserError: it has no template, or that does.
    """
    if tokenizer is None:
        return
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError(
            f"the {name} dataset has chats, and the tokenizer has no chat template: give one with "
            "chat_template_path, or texts."
        )
    for number, row in enumerate(rows):
        for column in SAID:
            if isinstance(row.get(column), list):
                try:
                    _rendered(row, column, tokenizer)
                except Exception as error:  # a template may raise, and stumble over, anything
                    raise UserError(
                        f"example {number} of the {name} dataset cannot be put into the chat "
                        f"template: {first_line(error)}"
                    ) from error


def _read(rows: Any, reader: PreferenceReader, tokenizer: Any) -> Iterator[Row]:
    """Rows as the trainer takes them."""

    def lost(number: int) -> None:
        reader.notes.add(NULLS, number)

    texts = _takes_texts(tokenizer)
    for number, row in enumerate(plain_rows(rows, lost)):
        made = reader(row, number)
        if made is not None:
            chats = {c: as_taken(made[c], texts) for c in SAID if isinstance(made.get(c), list)}
            yield {**made, **chats}


def _takes_texts(tokenizer: Any) -> bool | None:
    known = getattr(tokenizer, "chat_template", None) is not None
    return takes_texts(tokenizer) if known else None


def _stream(rows: IterableDataset, reader: PreferenceReader, tokenizer: Any) -> IterableDataset:
    """Rows as they are asked for.

    Raises:
        UserError: the trainer takes no streams.
    """
    if not reader.method.streams:
        raise UserError(f"TRL's trainer for {reader.title} takes no streams: leave streaming out.")
    return IterableDataset.from_generator(
        _streamed, gen_kwargs={"rows": rows, "reader": reader, "tokenizer": tokenizer}
    )


def _streamed(rows: IterableDataset, reader: PreferenceReader, tokenizer: Any) -> Iterator[Row]:
    for row in _read(rows, reader, tokenizer):
        yield {**row, **_json_of_tools(row)}


def _json_of_tools(row: Row) -> Row:
    """Tools as JSON text, which TRL decodes: Arrow would unite what they take."""
    return {"tools": json.dumps(row["tools"])} if row.get("tools") else {}


# --- Arrow ----------------------------------------------------------------------------------


def _as_arrow(rows: list[Row], method: Method, name: str, tokenizer: Any) -> Dataset:
    """A `Dataset` of which the trainer makes what the rows say.

    Raises:
        UserError: Arrow would give another chat back, or has no form for the rows.
    """
    if method.others:  # read row by row, never mapped: our own transform may stay
        return Dataset.from_list(rows) if is_uniform(rows) else as_dataset(rows)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    empty: Row = {"chat_template_kwargs": {}}
    filled = [
        {**{c: row.get(c, empty.get(c)) for c in columns}, **_json_of_tools(row)} for row in rows
    ]
    try:
        made = Dataset.from_list(filled)
    except Exception as error:  # values of several types in one place
        raise UserError(
            f"the {name} dataset has values of several types in one place, which TRL cannot be "
            f"given: {first_line(error)}"
        ) from error
    if not is_uniform(filled):
        for number, (given, held) in enumerate(zip(filled, made, strict=True)):
            if given != held and not _is_the_same(given, held, tokenizer):
                raise UserError(
                    f"example {number} of the {name} dataset has turns, arguments or options with "
                    "other keys than others have, which TRL would be given as nulls, and its chat "
                    "template would show them: leave such rows out, or give all the same keys."
                )
    return made


def _is_the_same(given: Row, held: Row, tokenizer: Any) -> bool:
    """Whether a chat template makes the same of a row and of what Arrow gives back."""
    if getattr(tokenizer, "chat_template", None) is None:
        return False
    chats = [column for column in SAID if isinstance(given.get(column), list)]
    try:
        return all(_rendered(given, c, tokenizer) == _rendered(held, c, tokenizer) for c in chats)
    except Exception:  # it stumbles over the nulls
        return False


def _rendered(row: Row, column: str, tokenizer: Any) -> str:
    turns = row[column] if column == "prompt" else [*row.get("prompt", []), *row[column]]
    options = dict(row.get("chat_template_kwargs") or {})
    if row.get("tools"):
        tools = row["tools"]
        options["tools"] = json.loads(tools) if isinstance(tools, str) else tools
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, **options)
    return text
