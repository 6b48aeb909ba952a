"""The datasets of `leanlift eval`, read and tokenized before any model is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from leanlift.cli.eval_data import Data
from leanlift.data.dataset import load_rows
from leanlift.data.functions import function_named
from leanlift.data.ready import formatted
from leanlift.data.tokens import Tokenization
from leanlift.data.windows import window_length
from leanlift.errors import UserError
from leanlift.evaluation.evaluate import Sample, asked_of, to_samples
from leanlift.rows.files import is_document


@dataclass(frozen=True)
class Dataset:
    """One dataset, tokenized.

    Attributes:
        data: what was named.
        samples: its rows, or the windows of a text.
        asked: those that a greedy answer is wanted of.
        is_text: whether it is a text, read in windows.
    """

    data: Data
    samples: list[Sample]
    asked: list[Sample]
    is_text: bool

    @property
    def units(self) -> int:
        """Rows of the file, or windows of the text: a chat is one, with all its turns."""
        return len({sample.row for sample in self.samples})


def datasets_of(
    options: argparse.Namespace, tokenizer: Any, how: Tokenization, base: str, revision: str | None
) -> tuple[Dataset, ...]:
    """All that the options name, as a tokenizer has them.

    Raises:
        UserError: one that cannot be used; says which.
    """
    if options.limit is not None and options.limit < 1:
        raise UserError(f"expected a limit of at least 1, got {options.limit}.")
    function = options.formatting_func
    if function is not None:
        function = function_named(function, "--formatting_func")
    window = window_length(base, options.max_length, revision=revision)
    several = len(options.data) > 1

    def read(data: Data) -> Dataset:
        rows, where = load_rows(data.path, name="eval"), data.where(several)
        is_text = is_document(rows.column_names)
        if not is_text:
            rows = rows.select(range(min(options.limit or len(rows), len(rows))))
            rows = rows if function is None else formatted(rows, function, where)
        samples = to_samples(rows, tokenizer, how, where, window)
        samples = samples[: options.limit] if is_text else samples
        if several and not any(sample.trained for sample in samples):
            raise UserError(f"{data.path} has no token that counts in a loss: leave it out.")
        return Dataset(data, samples, asked_of(samples, options.max_new_tokens), is_text)

    return tuple(map(read, options.data))


def tokens_in(datasets: Sequence[Dataset]) -> set[int]:
    """The ids that occur in them."""
    samples = [sample for dataset in datasets for sample in dataset.samples]
    return set().union(*(sample.whole for sample in samples), *(s.prompt for s in samples))
