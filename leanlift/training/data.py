"""Rows made ready to train on, and what was found on the way.

`token_rows` reads and converts every row (`ExampleReader`), tokenizes the examples
(`Tokenization`), cuts them to length and drops those without a trained token; its `LengthReport`
says what it did. It needs a tokenizer and no model, so whatever is wrong with a row shows before
the base is loaded. TRL then packs, shuffles and collates.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, Features, IterableDataset, List, Value

from leanlift.errors import UserError
from leanlift.training.examples import NO_ASSISTANT, NULLS, ExampleReader, columns_of
from leanlift.training.rows import (
    Row,
    as_dataset,
    is_transformed,
    is_uniform,
    load_rows,
    plain_rows,
)
from leanlift.training.tokens import IGNORED, Tokenization, Tokens

__all__ = [
    "LengthReport",
    "TokenRows",
    "calibration_batches",
    "load_rows",
    "to_examples",
    "token_rows",
    "token_stream",
    "tokenized",
]

logger = logging.getLogger("leanlift")

STRATEGIES = ("bfd", "bfd_split", "wrapped")
CUTTING = ("bfd",)
"""Packing strategies that cut what is longer than a pack; the others spread it over several."""


@dataclass(frozen=True)
class LengthReport:
    """What became of a dataset's rows.

    Attributes:
        rows: examples in all.
        longest: tokens of the longest one.
        truncated: examples longer than `max_length`; they lose their end (or start), unless
            they are packed by a strategy that splits.
        untrained: examples without a single trained token (all labels -100), which are dropped.
        max_length: as in `SFTConfig`.
        split: whether what is too long is split over several packs instead of being cut.
        unended: examples that train no end token.
        notes: what rows lost or had changed when they were converted.
    """

    name: str
    rows: int
    longest: int
    truncated: int
    untrained: int
    max_length: int | None
    split: bool = False
    unended: int = 0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{self.name}: {self.rows} examples, the longest has {self.longest} tokens"
        if self.truncated:
            fate = "split over several packs" if self.split else "cut"
            text += (
                f"; {self.truncated} are longer than max_length={self.max_length} and are {fate}"
            )
        if self.untrained:
            text += f"; {self.untrained} have no token to train on and are dropped"
        if self.unended:
            text += f"; {self.unended} train no end token"
        return "; ".join([text, *self.notes]) + "."


@dataclass(frozen=True)
class TokenRows:
    """Tokenized examples, `input_ids` and `labels`, and the report about them."""

    data: Dataset
    report: LengthReport


@dataclass(frozen=True)
class Cut:
    """What is done with examples that are too long.

    Attributes:
        max_length: in tokens; None: any length.
        keep_end: whether the start is cut off.
        split: whether they are left whole, for a packing that splits them.
    """

    max_length: int | None = None
    keep_end: bool = False
    split: bool = False

    @classmethod
    def of(cls, sft: Any, packing: bool) -> Cut:
        """As training arguments have it."""
        return cls(
            sft.max_length,
            sft.truncation_mode == "keep_end",
            packing and sft.packing_strategy not in CUTTING,
        )

    def __call__(self, ids: list[int]) -> list[int]:
        if self.max_length is None or self.split:
            return ids
        return ids[-self.max_length :] if self.keep_end else ids[: self.max_length]


def check_row_settings(sft: Any) -> None:
    """Refuse what TRL would refuse after the base is loaded, or ignore.

    Raises:
        UserError: settings that exclude each other, or are none.
    """
    packs = sft.packing or sft.eval_packing
    unknown = set(sft.dataset_kwargs or ()) - {"skip_prepare_dataset"}
    problems = {
        "packing needs a max_length, the length of a pack": packs and sft.max_length is None,
        "padding_free without packing does not keep to max_length: set packing, or max_length to "
        "none": sft.padding_free and not sft.packing and sft.max_length is not None,
        f"packing_strategy {sft.packing_strategy!r} is none of {', '.join(STRATEGIES)}": (
            sft.packing_strategy not in STRATEGIES
        ),
        f"truncation_mode {sft.truncation_mode!r} is neither keep_start nor keep_end": (
            sft.truncation_mode not in ("keep_start", "keep_end")
        ),
        f"dataset_kwargs has skip_prepare_dataset alone, not {', '.join(sorted(unknown))}": unknown,
        f"max_length {sft.max_length} is not positive": (
            sft.max_length is not None and sft.max_length < 1
        ),
    }
    for problem, found in problems.items():
        if found:
            raise UserError(f"these settings do not work: {problem}.")


def skips_preparation(sft: Any) -> bool:
    """Whether rows go to the collator as they are."""
    return bool((sft.dataset_kwargs or {}).get("skip_prepare_dataset"))


def check_prepared(rows: Any, name: str) -> None:
    """Rows that go to the collator as they are.

    Raises:
        UserError: they are not tokenized.
    """
    if isinstance(rows, (Dataset, IterableDataset)):
        found: Row = next(iter(rows), {})
        if {"input_ids", "labels"} <= found.keys():
            return
    raise UserError(
        f"skip_prepare_dataset takes rows as they are, and the {name} dataset is not tokenized: "
        "expected a Dataset with input_ids and labels."
    )


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
    reader = _reader(rows, name, chat, text_field, False)
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
        rows: a `Dataset` or list of dicts.
        how: the tokenization.
        name: "train" or "eval", for messages.
        cut: to what length; by default to none.
        workers: processes to tokenize with; None: this one.

    Raises:
        UserError: no rows, rows that cannot be used, or nothing left to train on.
    """
    rows, worker = a_dataset(rows, name), _Worker(how, name, cut or Cut())
    columns: dict[str, Any] = {"input_ids": List(Value("int32")), "labels": List(Value("int32"))}
    found = {"length": "int32", "trained": "int32", "ended": "bool", "parted": "bool"}
    found["row"] = "int64"
    lines: tuple[str, ...] = ()
    given = "input_ids" in rows.column_names
    if given:
        source, call = rows, {"function": worker.of_tokens, "with_indices": True}
        if "seq_lengths" in rows.column_names:  # packed already
            columns["seq_lengths"] = rows.features["seq_lengths"]
    else:
        reader = _reader(rows, name, how.chat, how.text_field, how.completion_only is False)
        pairs = list(_examples(rows, reader, as_json=True))
        _refuse_nothing(len(pairs), reader, len(rows))
        lines = reader.lines(len(rows))
        source = Dataset.from_dict({"row": [n for n, _ in pairs], "json": [e for _, e in pairs]})
        call = {"function": worker.of_json}
    made = source.map(
        **call,
        remove_columns=source.column_names,
        features=Features({**columns, **{key: Value(kind) for key, kind in found.items()}}),
        num_proc=workers,
        new_fingerprint=secrets.token_hex(8),  # nothing is cached, so nothing needs to be hashed
        load_from_cache_file=False,
        desc=f"Tokenizing {name} dataset",
    ).with_format(None)
    data, report = _drop_untrained(made, name, worker.cut, lines, given)
    return TokenRows(data.select_columns(list(columns)), report)


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


def _reader(rows: Any, name: str, chat: bool, text_field: str, whole_chats: bool) -> ExampleReader:
    if isinstance(rows, Dataset) and len(rows) == 0:
        raise UserError(f"the {name} dataset holds no rows: there is nothing to train on.")
    return ExampleReader(name, columns_of(rows), chat, text_field, whole_chats)


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


class _Worker:
    """Tokenizes and cuts one example; what `Dataset.map` calls, perhaps in several processes."""

    def __init__(self, how: Tokenization, name: str, cut: Cut) -> None:
        self.how, self.name, self.cut = how, name, cut

    def of_json(self, row: Row) -> Row:
        return self.of_example(json.loads(row["json"]), row["row"])

    def of_tokens(self, row: Row, number: int) -> Row:
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
        tokens = self.how(example, f"row {number} of the {self.name} dataset")
        labels = self.cut(tokens.labels)
        return {
            "input_ids": self.cut(tokens.ids),
            "labels": labels,
            "length": len(tokens.ids),
            "trained": sum(label != IGNORED for label in labels[1:]),
            "ended": not self.how.ends.isdisjoint(tokens.labels),
            "parted": tokens.parted,
            "row": number,
        }


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


def drop_untrained_packs(packs: Any, name: str) -> Any:
    """Without packs that hold nothing but untrained parts of split examples: a step of such packs
    alone would divide by zero. A stream's are left."""
    if not isinstance(packs, Dataset):
        return packs
    keep = [
        number
        for number, labels in enumerate(packs["labels"])
        if any(label != IGNORED for label in labels[1:])
    ]
    if not keep or len(keep) == len(packs):
        return packs
    logger.warning(
        "%s: %d of %d packs have no token to train on and are dropped.",
        name,
        len(packs) - len(keep),
        len(packs),
    )
    return packs.select(keep)


def say(report: LengthReport, how: Tokenization) -> None:
    """Log a report: as a warning where something was lost; and that nothing trains to stop."""
    loud = report.truncated or report.untrained or report.unended
    loud = loud or any(not note.startswith("columns not used") for note in report.notes)
    (logger.warning if loud else logger.info)("%s", report)
    if report.unended == report.rows:
        ends = how.tokenizer.convert_ids_to_tokens(sorted(how.ends))
        logger.warning(
            "no end token is trained: no %s row has %s in what is trained, so the model will not "
            "learn to stop; end the assistant's turns with it in the chat template, or name the "
            "token that ends them with eos_token.",
            report.name,
            " or ".join(map(repr, ends)),
        )


def tokenized(
    rows: Any, how: Tokenization, name: str = "train"
) -> Iterator[tuple[int, Row, Tokens]]:
    """Row number, example and tokens of each example, as they are asked for; what rows lost on the
    way is logged after the last.

    Raises:
        UserError: no rows, rows that cannot be used, or nothing left of them.
    """
    rows, reader = a_dataset(rows, name), None
    pairs: Iterator[tuple[int, Row]] = enumerate(plain_rows(rows))
    if "input_ids" not in rows.column_names:
        whole = how.completion_only is False
        reader = _reader(rows, name, how.chat, how.text_field, whole)
        pairs = _examples(rows, reader)
    count = 0
    for number, example in pairs:
        yield number, example, how(example, f"row {number} of the {name} dataset")
        count += 1
    if reader is not None:
        _refuse_nothing(count, reader, len(rows))
        lines = reader.lines(len(rows))
        if lines:
            logger.warning("%s: %s.", name, "; ".join(lines))


def calibration_batches(
    rows: Any, tokenizer: Any, max_length: int | None, count: int, how: Tokenization | None = None
) -> list[dict[str, torch.Tensor]]:
    """The first `count` examples that train something as batches of one: `input_ids` and `labels`
    [1, T].

    Args:
        rows: as for training.
        tokenizer: prepared.
        max_length: what is longer is cut.
        count: how many.
        how: the tokenization; by default `Tokenization.of(tokenizer)`.
    """
    cut, batches = Cut(max_length), []
    for _, _, tokens in tokenized(rows, how or Tokenization.of(tokenizer)):
        ids, labels = cut(tokens.ids), cut(tokens.labels)
        if any(label != IGNORED for label in labels[1:]):
            batches.append({"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])})
        if len(batches) == count:
            break
    return batches


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
    whole = how.completion_only is False
    reader = None if given else _reader(rows, name, how.chat, how.text_field, whole)
    logger.warning("%s: a stream, of which rows that are dropped or changed are not counted.", name)
    return rows.map(
        _StreamWorker(_Worker(how, name, cut), reader, getattr(rows, "features", None)),
        batched=True,
        batch_size=8,
        with_indices=True,
        remove_columns=columns,
        features=Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))}),
    )


class _StreamWorker:
    """Converts and tokenizes a few rows of a stream."""

    def __init__(self, worker: _Worker, reader: ExampleReader | None, features: Any) -> None:
        self.worker, self.reader = worker, reader
        self.features = features

    def __call__(self, batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        made: dict[str, list[Any]] = {"input_ids": [], "labels": []}
        given = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values())]  # noqa: B905
        for number, row in zip(numbers, plain_rows(_Few(given, self.features)), strict=True):
            for example in self._read(row, number):
                found = self.worker.of_example(example, number)
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
            logger.warning("row %d of the %s dataset: %s.", number, self.reader.name, what)
        return examples


class _Few(list):
    """Rows with the features of the stream they come from."""

    def __init__(self, rows: list[Row], features: Any) -> None:
        super().__init__(rows)
        self.features = features
