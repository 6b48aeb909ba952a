"""From rows that people have to rows that TRL trains on.

Four shapes of rows are understood: `messages` (chat), `prompt`/`completion`, `text`, and alpaca's
`instruction`/`input`/`output`. All but `text` become prompt and completion, so that the loss is
on completions only and does not depend on generation markers in a chat template. TRL does the
tokenizing, the labels and the packing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset

from leanlift.errors import UserError, first_line

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
"""The prompts of Stanford Alpaca, which instruction data of this shape is commonly trained with."""

FILE_TYPES = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_rows(source: str, split: str = "train") -> Dataset:
    """Rows from a local JSON, JSONL or Parquet file, or from a dataset's hub name.

    Raises:
        UserError: missing, unreadable or empty.
    """
    path = Path(source)
    kind = FILE_TYPES.get(path.suffix)
    if kind and not path.is_file():
        raise UserError(f"{source} does not exist: expected a JSON, JSONL or Parquet file of rows.")
    if not kind and path.is_file():
        raise UserError(f"{source} is no data file: expected .json, .jsonl or .parquet.")
    try:
        if kind:
            rows = datasets.load_dataset(kind, data_files=str(path), split="train")
        else:
            rows = datasets.load_dataset(source, split=split)
    except Exception as error:  # each backend raises its own kinds
        raise UserError(f"{source} cannot be read as rows: {first_line(_cause(error))}") from error
    if len(rows) == 0:
        raise UserError(f"{source} holds no rows: there is nothing to train on.")
    return rows


def _cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


Row = dict[str, Any]


@dataclass(frozen=True)
class RowFormat:
    """A shape of rows: the columns it needs and how a row becomes one or more examples."""

    required: tuple[str, ...]
    convert: Callable[[Row, bool], list[Row]]


def _from_messages(row: Row, chat: bool) -> list[Row]:
    """One example per assistant turn, each with everything before it as the prompt."""
    turns = row["messages"]
    return [
        {"prompt": turns[:i], "completion": [turn]}
        for i, turn in enumerate(turns)
        if turn["role"] == "assistant" and i > 0
    ]


def _from_prompt(row: Row, chat: bool) -> list[Row]:
    return [{"prompt": row["prompt"], "completion": row["completion"]}]


def _from_instruction(row: Row, chat: bool) -> list[Row]:
    extra = row.get("input") or ""
    if chat:
        question = f"{row['instruction']}\n\n{extra}" if extra else row["instruction"]
        return [
            {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": row["output"]}],
            }
        ]
    template = ALPACA_WITH_INPUT if extra else ALPACA
    prompt = template.format(instruction=row["instruction"], input=extra)
    return [{"prompt": prompt, "completion": row["output"]}]


def _from_text(row: Row, chat: bool) -> list[Row]:
    return [{"text": row["text"]}]


FORMATS = (
    RowFormat(("messages",), _from_messages),
    RowFormat(("prompt", "completion"), _from_prompt),
    RowFormat(("instruction", "output"), _from_instruction),
    RowFormat(("text",), _from_text),
)


def to_examples(rows: Dataset, chat: bool, name: str = "train") -> Dataset:
    """Bring rows into one of TRL's shapes: `prompt`/`completion` or `text`.

    Args:
        rows: a dataset in one of the shapes above; one that has `input_ids` is left as it is.
        chat: whether the tokenizer has a chat template (alpaca rows then become chats).
        name: "train" or "eval", for messages.

    Raises:
        UserError: no rows, no known shape, or a row that lacks a column; names row and columns.
    """
    shape = check_rows(rows, name)
    if shape is None:
        return rows
    converted = [example for row in rows for example in shape.convert(row, chat)]
    if not converted:
        raise UserError(
            f"no row of the {name} dataset has an assistant message: there is nothing to train on."
        )
    return Dataset.from_list(converted)


def check_rows(rows: Dataset, name: str = "train") -> RowFormat | None:
    """Find the shape of the rows and look at each one; None for rows that are tokenized already.

    Raises:
        UserError: no rows, no known shape, or a row that lacks a column.
    """
    if len(rows) == 0:
        raise UserError(f"the {name} dataset holds no rows: there is nothing to train on.")
    columns = set(rows.column_names)
    if "input_ids" in columns:
        return None
    shape = next((fmt for fmt in FORMATS if columns.issuperset(fmt.required)), None)
    if shape is None:
        raise UserError(
            f"row 0 of the {name} dataset has the columns {sorted(columns)}; expected messages, "
            "prompt and completion, instruction and output (input optional), or text."
        )
    for number, row in enumerate(rows):
        _check_row(row, shape.required, number, name)
    return shape


def _check_row(row: Row, required: tuple[str, ...], number: int, name: str) -> None:
    for column in required:
        value = row.get(column)
        if value is None or (column == "messages" and not _is_chat(value)):
            found = sorted(key for key, other in row.items() if other is not None)
            problem = "no" if value is None else "no list of role and content in"
            raise UserError(
                f"row {number} of the {name} dataset has {problem} {column!r} (columns found: "
                f"{found}); every row needs {' and '.join(required)}."
            )


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(turn, dict) and turn.get("role") and turn.get("content") is not None
        for turn in value
    )


def calibration_batches(
    rows: Dataset, tokenizer: Any, max_length: int | None, count: int
) -> list[dict[str, torch.Tensor]]:
    """The first `count` examples as batches of one: `input_ids` and `labels` [1, T].

    Labels are -100 on prompts; examples without a trained token are left out.
    """
    batches = []
    for prompt, whole in tokenized(rows, tokenizer, count):
        labels = [-100] * len(prompt) + whole[len(prompt) :]
        whole, labels = whole[:max_length], labels[:max_length]
        if any(label != -100 for label in labels[1:]):
            batches.append({"input_ids": torch.tensor([whole]), "labels": torch.tensor([labels])})
    return batches


def tokenized(rows: Dataset, tokenizer: Any, count: int) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids of the first `count` rows' examples: of the prompt, and of the whole."""
    chat = getattr(tokenizer, "chat_template", None) is not None
    for row in to_examples(rows.select(range(min(count, len(rows)))), chat, "first"):
        yield prompt_and_whole(row, tokenizer)


def prompt_and_whole(row: Row, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids of an example's prompt, and of the example with its end token."""
    if "text" in row:
        return [], tokenizer(row["text"] + tokenizer.eos_token)["input_ids"]
    if isinstance(row["prompt"], str):
        whole = row["prompt"] + row["completion"] + tokenizer.eos_token
        return tokenizer(row["prompt"])["input_ids"], tokenizer(whole)["input_ids"]
    template = tokenizer.apply_chat_template
    options = {"tokenize": True, "return_dict": False}
    return (
        template(row["prompt"], add_generation_prompt=True, **options),
        template(row["prompt"] + row["completion"], **options),
    )


@dataclass(frozen=True)
class LengthReport:
    """What `max_length` does to a tokenized dataset.

    Attributes:
        rows: examples in all.
        longest: tokens of the longest one.
        truncated: examples longer than `max_length`, which lose their end.
        untrained: examples without a single trained token (all labels -100), which are dropped.
    """

    name: str
    rows: int
    longest: int
    truncated: int
    untrained: int
    max_length: int | None

    def __str__(self) -> str:
        text = f"{self.name}: {self.rows} examples, the longest has {self.longest} tokens"
        if self.truncated:
            text += f"; {self.truncated} are longer than max_length={self.max_length} and are cut"
        if self.untrained:
            text += f"; {self.untrained} have no token to train on and are dropped"
        return text + "."


def drop_untrained(
    tokenized: Dataset, max_length: int | None, keep_end: bool, packing: bool, name: str
) -> tuple[Dataset, LengthReport]:
    """Drop examples whose labels are all -100 after truncation, and say what was found.

    Packing cuts nothing off before it packs, so there only labels count, not length.

    Raises:
        UserError: nothing is left.
    """
    cut = None if packing or max_length is None else max_length
    window = slice(None) if cut is None else slice(-cut, None) if keep_end else slice(None, cut)
    keep, longest, truncated = [], 0, 0
    for number, labels in enumerate(tokenized["labels"]):
        longest = max(longest, len(labels))
        truncated += max_length is not None and len(labels) > max_length
        if any(label != -100 for label in labels[window]):
            keep.append(number)
    report = LengthReport(
        name, len(tokenized), longest, truncated, len(tokenized) - len(keep), max_length
    )
    if not keep:
        raise UserError(
            f"none of the {report.rows} {name} examples has a token to train on (all labels are "
            f"-100); {truncated} are longer than max_length={max_length}: check the completions, "
            "or raise max_length."
        )
    return (tokenized if len(keep) == len(tokenized) else tokenized.select(keep)), report
