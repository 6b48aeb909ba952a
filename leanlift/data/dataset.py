"""Rows made ready to train on, and what was found on the way.

`token_rows` reads and converts every row (`ExampleReader`), tokenizes the examples
(`Tokenization`), cuts them to length and drops those without a trained token; its `LengthReport`
says what it did. It needs a tokenizer and no model, so whatever is wrong with a row shows before
the base is loaded. TRL then packs, shuffles and collates.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset, Features, IterableDataset, List, Value

from leanlift._version import __version__
from leanlift.data.lengths import Cut, LengthReport
from leanlift.data.tokens import IGNORED, Tokenization, Tokens
from leanlift.data.windows import in_windows
from leanlift.errors import UserError
from leanlift.rows.examples import NO_ASSISTANT, NULLS, ExampleReader, columns_of
from leanlift.rows.source import (
    Row,
    as_dataset,
    is_transformed,
    is_uniform,
    load_rows,
    plain_rows,
)
from leanlift.rows.turns import Notes

__all__ = [
    "TokenRows",
    "Worker",
    "calibration_batches",
    "load_rows",
    "reader_of",
    "to_examples",
    "token_rows",
    "tokenized",
]

logger = logging.getLogger("leanlift")


@dataclass(frozen=True)
class TokenRows:
    """Tokenized examples.

    Attributes:
        data: `input_ids` and `labels`.
        report: what became of the rows.
        origin: the number of the `row` that each is of: a chat may be several; None: not known.
    """

    data: Dataset
    report: LengthReport
    origin: Dataset | None = None


def to_examples(
    rows: Dataset, chat: bool, name: str = "train", text_field: str = "text"
) -> Dataset:
    """Bring rows into one of TRL's shapes: `prompt`/`completion` or `text`.

    Args:
        rows: a dataset in one of the shapes of `ExampleReader`; one that has `input_ids` is left
            as it is.
        chat: whether the tokenizer has a chat template (alpaca rows then become chats).
        name: "train" or "eval", for messages.
        text_field: the column of plain texts.

    Raises:
        UserError: no rows, no known shape, or a row that cannot be used; names row and column.
    """
    if "input_ids" in rows.column_names:
        return rows
    if len(rows) == 0:
        raise UserError(f"the {name} dataset holds no rows: there is nothing to train on.")
    reader = ExampleReader(name, rows.column_names, chat, text_field)
    examples = [example for _, example in _examples(rows, reader)]
    _refuse_nothing(len(examples), reader, len(rows))
    lines = reader.lines(len(rows))
    if lines:
        logger.warning("%s: %s.", name, "; ".join(lines))
    return Dataset.from_list(examples) if is_uniform(examples) else as_dataset(examples)


def token_rows(
    rows: Any, how: Tokenization, name: str = "train", cut: Cut | None = None, workers: Any = None
) -> TokenRows:
    """Tokenize a dataset.

    Args:
        rows: a `Dataset` or list of dicts; of a text, windows as long as `cut` says are made.
        how: the tokenization.
        name: "train" or "eval", for messages.
        cut: to what length; by default to none.
        workers: processes to tokenize with; None: this one.

    Raises:
        UserError: no rows, rows that cannot be used, or nothing left to train on.
    """
    worker = Worker(how, name, cut or Cut())
    rows = in_windows(a_dataset(rows, name), how, worker.cut.max_length)
    columns: dict[str, Any] = {"input_ids": List(Value("int32")), "labels": List(Value("int32"))}
    found = {"length": "int32", "trained": "int32", "ended": "bool", "parted": "bool"}
    found["row"] = "int64"
    noted = {"left_out": List(Value("string"))}
    lines: tuple[str, ...] = ()
    given = "input_ids" in rows.column_names
    mark = secrets.token_hex(8)  # made in memory: there is no cache to find it by
    if given:
        facts = (rows._fingerprint, __version__, worker.cut, replace(how, tokenizer=None))
        mark = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]  # cached where its rows are
        source, call = rows, {"function": worker.of_tokens, "with_indices": True}
        if "seq_lengths" in rows.column_names:  # packed already
            columns["seq_lengths"] = rows.features["seq_lengths"]
    else:
        reader = reader_of(rows, name, how)
        pairs = list(_examples(rows, reader, as_json=True))
        _refuse_nothing(len(pairs), reader, len(rows))
        lines = reader.lines(len(rows))
        source = Dataset.from_dict({"row": [n for n, _ in pairs], "json": [e for _, e in pairs]})
        call = {"function": worker.of_json}
    made = source.map(
        **call,
        remove_columns=source.column_names,
        features=Features({**columns, **noted, **{k: Value(kind) for k, kind in found.items()}}),
        num_proc=workers,
        new_fingerprint=mark,
        desc=f"Tokenizing {name} dataset",
    ).with_format(None)
    if not given:
        lines += _left_out(made, len(rows))
    data, report = _drop_untrained(made, name, worker.cut, lines, given)
    return TokenRows(data.select_columns(list(columns)), report, data.select_columns(["row"]))


def a_dataset(rows: Any, name: str) -> Dataset:
    """Rows as a `Dataset` that holds some.

    Raises:
        UserError: something else, nothing, or rows behind a transform of the user's.
    """
    if isinstance(rows, (list, tuple)):
        rows = as_dataset(rows)
    if not isinstance(rows, Dataset):
        raise UserError(
            f"the {name} dataset is a {type(rows).__name__}: expected a Dataset, an "
            "IterableDataset or a list of dicts."
        )
    if len(rows) == 0:
        raise UserError(f"the {name} dataset holds no rows: there is nothing to train on.")
    if is_transformed(rows):
        raise UserError(
            f"the {name} dataset has a transform (with_transform), which may give other rows each "
            "time: apply it with map, or give tokenized rows and dataset_kwargs="
            '{"skip_prepare_dataset": true}.'
        )
    return rows if rows.format["type"] in (None, "custom") else rows.with_format(None)


def reader_of(rows: Any, name: str, how: Tokenization) -> ExampleReader:
    """What converts the rows of a dataset or stream for a tokenization."""
    whole_chats = how.completion_only is False
    return ExampleReader(name, columns_of(rows), how.chat, how.text_field, whole_chats)


def _examples(rows: Any, reader: ExampleReader, as_json: bool = False) -> Iterator[tuple[int, Any]]:
    """Row number and example (or its JSON), over all rows."""

    def lost(number: int) -> None:
        reader.notes.add(NULLS, number)

    for number, row in enumerate(plain_rows(rows, lost)):
        for example in reader(row, number):
            yield number, _to_json(example, reader, number) if as_json else example


def _to_json(example: Row, reader: ExampleReader, number: int) -> str:
    try:
        return json.dumps(example)
    except (TypeError, ValueError) as error:
        reader.refuse(number, f"a value that JSON has no form for ({error})")


def _refuse_nothing(examples: int, reader: ExampleReader, rows: int) -> None:
    if examples:
        return
    if set(reader.notes.found) <= {NO_ASSISTANT}:
        raise UserError(
            f"no row of the {reader.name} dataset has an assistant message: there is nothing to "
            "train on."
        )
    raise UserError(
        f"no row of the {reader.name} dataset leaves something to train on: "
        f"{'; '.join(reader.notes.lines(rows))}."
    )


class Worker:
    """Tokenizes and cuts one example; what `Dataset.map` calls, perhaps in several processes."""

    def __init__(self, how: Tokenization, name: str, cut: Cut) -> None:
        self.how, self.name, self.cut = how, name, cut

    def of_json(self, row: Row) -> Row:
        """Tokens of an example that is kept as JSON text, with its row's number."""
        return self.of_example(json.loads(row["json"]), row["row"])

    def of_tokens(self, row: Row, number: int) -> Row:
        """Tokens of a row that has tokens already, packs included."""
        made = self.of_example(row, number)
        packs = row.get("seq_lengths")
        if packs is not None:
            if len(made["labels"]) != sum(packs):
                raise UserError(
                    f"row {number} of the {self.name} dataset is packed (it has seq_lengths), and "
                    f"{len(made['labels'])} tokens are left of it for seq_lengths of {sum(packs)}: "
                    f"pack to max_length={self.cut.max_length}, without padding."
                )
            made["seq_lengths"] = packs
        return made

    def of_example(self, example: Row, number: int) -> Row:
        """Tokens of an example, cut, and what is counted of them."""
        tokens = self.how(example, f"row {number} of the {self.name} dataset")
        labels = self.cut(tokens.labels)
        return {
            "input_ids": self.cut(tokens.ids),
            "labels": labels,
            "length": len(tokens.ids),
            "trained": sum(label != IGNORED for label in labels[1:]),
            "ended": not self.how.ends.isdisjoint(tokens.labels),
            "parted": tokens.parted,
            "left_out": tokens.left_out,
            "row": number,
        }


def _left_out(made: Dataset, rows: int) -> tuple[str, ...]:
    """What templates left out, for a report over so many rows."""
    notes = Notes()
    for number, lost in zip(made["row"][:], made["left_out"][:], strict=True):
        for what in lost:
            notes.add(what, number)
    return notes.lines(rows)


def _drop_untrained(
    made: Dataset, name: str, cut: Cut, lines: tuple[str, ...], given: bool
) -> tuple[Dataset, LengthReport]:
    """Without examples of which nothing is trained: their loss would be 0 / 0."""
    lengths, trained, numbers = made["length"][:], made["trained"][:], made["row"][:]
    keep = [i for i, count in enumerate(trained) if count]
    parted = [numbers[i] for i, apart in enumerate(made["parted"][:]) if apart]
    if parted:
        lines += (
            f"{len(parted)} prompts end differently alone than before their completion, and are "
            f"trained from where the two part (first: row {parted[0]})",
        )
    report = LengthReport(
        name,
        rows=len(made),
        longest=max(lengths),
        truncated=sum(cut.max_length is not None and n > cut.max_length for n in lengths),
        untrained=len(made) - len(keep),
        max_length=cut.max_length,
        split=cut.split,
        unended=0 if given else len(made) - sum(made["ended"][:]),
        notes=lines,
    )
    if not keep:
        raise UserError(
            f"none of the {report.rows} {name} examples has a token to train on (all labels are "
            f"-100); {report.truncated} are longer than max_length={cut.max_length}: check the "
            "completions, or raise max_length."
        )
    return (made if len(keep) == len(made) else made.select(keep)), report


def tokenized(
    rows: Any, how: Tokenization, name: str = "train", window: int | None = None
) -> Iterator[tuple[int, Row, Tokens]]:
    """Row number, example and tokens of each example, as they are asked for; what rows lost on the
    way is logged after the last. `window`: of a text, as `in_windows` has it.

    Raises:
        UserError: no rows, rows that cannot be used, or nothing left of them.
    """
    rows, reader = in_windows(a_dataset(rows, name), how, window), None
    pairs: Iterator[tuple[int, Row]] = enumerate(plain_rows(rows))
    if "input_ids" not in rows.column_names:
        reader = reader_of(rows, name, how)
        pairs = _examples(rows, reader)
    count, lost = 0, Notes()
    for number, example in pairs:
        tokens = how(example, f"row {number} of the {name} dataset")
        for what in tokens.left_out:
            lost.add(what, number)
        yield number, example, tokens
        count += 1
    if reader is not None:
        _refuse_nothing(count, reader, len(rows))
        lines = (*reader.lines(len(rows)), *lost.lines(len(rows)))
        if lines:
            logger.warning("%s: %s.", name, "; ".join(lines))


def calibration_batches(
    rows: Any, tokenizer: Any, max_length: int | None, count: int, how: Tokenization | None = None
) -> list[dict[str, torch.Tensor]]:
    """The first `count` examples that train something as batches of one: `input_ids` and `labels`
    [1, T].

    Args:
        rows: as for training; of a stream the first, which train something where they are tokens.
        tokenizer: prepared.
        max_length: what is longer is cut.
        count: how many.
        how: the tokenization; by default `Tokenization.of(tokenizer)`.
    """
    cut, batches = Cut(max_length), []
    if isinstance(rows, IterableDataset):
        rows = list(rows.take(count))
    for _, _, tokens in tokenized(rows, how or Tokenization.of(tokenizer)):
        ids, labels = cut(tokens.ids), cut(tokens.labels)
        if any(label != IGNORED for label in labels[1:]):
            batches.append({"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])})
        if len(batches) == count:
            break
    return batches
