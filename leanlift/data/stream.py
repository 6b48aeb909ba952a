"""Rows that come as a stream: converted and tokenized as they are asked for."""

from __future__ import annotations

import logging
from typing import Any

from datasets import Features, IterableDataset, List, Value

from leanlift.data.dataset import Worker, reader_of
from leanlift.data.lengths import Cut
from leanlift.data.tokens import Tokenization
from leanlift.errors import UserError
from leanlift.processes import processes
from leanlift.rows.examples import ExampleReader, columns_of
from leanlift.rows.source import Row, plain_rows

logger = logging.getLogger("leanlift")


def token_stream(rows: IterableDataset, how: Tokenization, name: str, cut: Cut) -> IterableDataset:
    """A stream of rows as a stream of `input_ids` and `labels`, converted as `token_rows` does;
    what is dropped or changed is logged when it first happens, since nothing can be counted.

    Raises:
        UserError: no rows, or columns of no known shape.
    """
    columns = columns_of(rows)
    if not columns:
        raise UserError(f"the {name} dataset holds no rows: there is nothing to train on.")
    given = "input_ids" in columns
    reader = None if given else reader_of(rows, name, how)
    logger.warning("%s: a stream, of which rows that are dropped or changed are not counted.", name)
    return rows.map(
        _StreamWorker(Worker(how, name, cut), reader, getattr(rows, "features", None)),
        batched=True,
        batch_size=8,
        with_indices=True,
        remove_columns=columns,
        features=Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))}),
    ).select_columns(["input_ids", "labels"])  # of columns that the first row lacks, too


def check_long_enough(rows: IterableDataset, sft: Any, name: str) -> None:
    """Refuse a stream that ends before a single step is full: Trainer applies no step at the end of
    a stream, begins it again, and would go on so for ever.

    Args:
        rows: a stream with `input_ids`.
        sft: an `SFTConfig`.
        name: "train", for messages.

    Raises:
        UserError: it does.
    """
    batch, wanted = sft.per_device_train_batch_size, sft.gradient_accumulation_steps
    length = sft.max_length if sft.packing else None
    found = tokens = 0
    for row in rows:
        found += 1
        tokens += len(row["input_ids"])
        full = found if length is None else -(-tokens // length)  # packs are no longer than that
        if -(-full // (batch * processes())) >= wanted:  # the last batch may be a smaller one
            return
    packs = "" if length is None else f" ({tokens} tokens, in packs of {length})"
    raise UserError(
        f"the {name} dataset is a stream of {found} examples{packs}, and a step takes {wanted} "
        f"batches of {batch}: leave streaming out, or lower gradient_accumulation_steps or "
        "per_device_train_batch_size."
    )


class _StreamWorker:
    """Converts and tokenizes a few rows of a stream."""

    def __init__(self, worker: Worker, reader: ExampleReader | None, features: Any) -> None:
        self.worker, self.reader = worker, reader
        self.features = features

    def __call__(self, batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        made: dict[str, list[Any]] = {"input_ids": [], "labels": []}
        given = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values())]  # noqa: B905
        for number, row in zip(numbers, plain_rows(_Few(given, self.features)), strict=True):
            for example in self._read(row, number):
                found = self.worker.of_example(example, number)
                for what in found["left_out"]:
                    self._say_once(what, number)
                if found["trained"]:
                    made["input_ids"].append(found["input_ids"])
                    made["labels"].append(found["labels"])
        return made

    def _read(self, row: Row, number: int) -> list[Row]:
        if self.reader is None:
            return [row]
        known = set(self.reader.notes.found)
        examples = self.reader(row, number)
        for what in set(self.reader.notes.found) - known:
            self._log(what, number)
        return examples

    def _say_once(self, what: str, number: int) -> None:
        if self.reader is not None and self.reader.notes.add(what, number):
            self._log(what, number)

    def _log(self, what: str, number: int) -> None:
        logger.warning("row %d of the %s dataset: %s.", number, self.worker.name, what.rstrip(","))


class _Few(list):
    """Rows with the features of the stream they come from."""

    def __init__(self, rows: list[Row], features: Any) -> None:
        super().__init__(rows)
        self.features = features
