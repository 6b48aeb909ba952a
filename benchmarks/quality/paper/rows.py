"""The rows that are trained on, as files, and how many tokens they are.

The paper's suites train on the rows as they are. PEFT's comparison has one prompt, trains it
together with the answer, and goes through the rows in one order: those of at most 1300 characters,
as they come, each bucket of 20 batches sorted by length, the longest first. That order is written
down here, as a file of texts which is then read from its beginning. (Theirs ends a text with the
end token but where it is the longest of its batch; here every text ends with it.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.quality.paper.cost import Rows
from benchmarks.quality.paper.suites import Suite
from leanlift.data.dataset import load_rows, token_rows
from leanlift.data.lengths import Cut
from leanlift.data.tokens import Tokenization
from leanlift.errors import UserError
from leanlift.io.tensors import replacing
from leanlift.rows.files import DOCUMENT, is_document

PROMPT = "Question: {query} Think step by step.\nAnswer:"
"""PEFT's `query_template`."""

MOST_CHARACTERS = 1300
BUCKET = 20
"""Batches whose rows are sorted."""

COLUMNS = (("query", "response"), ("question", "answer"), ("instruction", "output"))
"""What files call a question and its worked answer."""


def pairs(path: Path) -> Iterator[tuple[str, str]]:
    """Questions and worked answers of a file.

    Raises:
        UserError: other columns, or a row without one of them.
    """
    rows = load_rows(str(path))
    names = next((both for both in COLUMNS if set(both) <= set(rows.column_names)), None)
    if names is None:
        wanted = ", or ".join(" and ".join(both) for both in COLUMNS)
        raise UserError(f"{path} has the columns {rows.column_names}: expected {wanted}.")
    for number, row in enumerate(rows):
        question, answer = row[names[0]], row[names[1]]
        if not isinstance(question, str) or not isinstance(answer, str):
            raise UserError(f"row {number} of {path} has no text as {' and '.join(names)}.")
        extra = row.get("input") if names[0] == "instruction" else None
        yield (f"{question}\n{extra}" if extra else question), answer


def training_rows(
    suite: Suite, data: Path, place: Path, tokenizer: Any, loop: dict[str, Any]
) -> tuple[Path, Rows]:
    """The file to train on, and what a run goes through.

    Args:
        suite: that is run.
        data: the user's file.
        place: of the file that is written for PEFT's order.
        tokenizer: of the base.
        loop: fields of LiftSFTConfig.

    Raises:
        UserError: rows that cannot be used.
    """
    if suite.as_peft:
        texts = in_their_order(data, tokenizer, loop["max_steps"], suite.batch)
        with replacing(place) as temporary:
            lines = (json.dumps({"text": text}) + "\n" for text in texts)
            temporary.write_text("".join(lines), encoding="utf-8")
        data = place
    cut, given = Cut(loop["max_length"]), load_rows(str(data))
    if is_document(given.column_names):
        raise UserError(f"{data} is a text: expected a file of rows to train on.")
    tokens = token_rows(given, Tokenization.of(tokenizer), cut=cut).data
    lengths = [len(ids) for ids in tokens["input_ids"][:]]
    steps = loop.get("max_steps", -1)
    if steps < 1:
        steps = math.ceil(len(lengths) / suite.batch) * loop["num_train_epochs"]
        return data, Rows(lengths, steps, len(lengths) * loop["num_train_epochs"])
    return data, Rows(lengths, steps, steps * suite.batch)


def in_their_order(data: Path, tokenizer: Any, steps: int, batch: int) -> list[str]:
    """The texts of so many batches, as PEFT's comparison goes through them.

    Raises:
        UserError: the file has fewer.
    """
    wanted, size = steps * batch, BUCKET * batch
    taken: list[tuple[str, str]] = []
    for question, answer in pairs(data):
        if len(f"{question} {answer}") <= MOST_CHARACTERS:
            taken.append((question, answer))
        if len(taken) == math.ceil(wanted / size) * size:
            break
    if len(taken) < wanted:
        raise UserError(
            f"{data} has {len(taken):,} rows of at most {MOST_CHARACTERS} characters, and "
            f"{steps:,} batches of {batch} take {wanted:,}: expected the whole of MetaMathQA."
        )
    texts = [PROMPT.format(query=question) + answer for question, answer in taken]
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    order: list[int] = []
    for start in range(0, len(texts), size):
        bucket = range(start, min(start + size, len(texts)))
        order += sorted(bucket, key=lambda i: -lengths[i])
    return [texts[i] for i in order[:wanted]]


def texts_of(path: Path, most: int = 100) -> list[str]:
    """The first texts of a file: passages apart by lines of ***, or rows with a column text.

    Raises:
        UserError: there is none.
    """
    rows = load_rows(str(path))
    if is_document(rows.column_names):
        whole = "\n".join(line.rstrip("\r") for line in rows[0][DOCUMENT].split("\n"))
        found = whole.split("\n***\n")
    else:
        if "text" not in rows.column_names:
            raise UserError(f"{path} has the columns {rows.column_names}: expected text.")
        found = [row["text"] for row in rows.select(range(min(most, len(rows))))]
    texts = [text.strip() for text in found if isinstance(text, str) and text.strip()]
    if not texts:
        raise UserError(f"{path} holds no text: expected some to measure forgetting on.")
    return texts[:most]
