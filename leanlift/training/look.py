"""What the rows of a file are like, before anything is trained on them: their columns, what they
are taken for, and how many tokens they have, through the tokenizer and template of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
from transformers import AutoConfig

from leanlift.data.dataset import token_rows
from leanlift.data.ready import RowsForTraining, has_images
from leanlift.data.tokenizer import end_tokens, load_tokenizer, vocabulary_rows
from leanlift.errors import UserError, first_line
from leanlift.format import bar, count
from leanlift.plan import Batch
from leanlift.plan.auto import takes_images
from leanlift.rows.examples import ExampleReader
from leanlift.rows.files import is_document
from leanlift.rows.source import load_rows
from leanlift.training.arguments import LiftSFTConfig
from leanlift.training.batches import lengths_of

LOOKED_AT = 2000
"""Rows that are tokenized, spread evenly over all of them."""

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
"""Values of max_length that are proposed."""

LOST = 0.01
"""The share of rows that the proposed max_length may cut."""

FORMS = {
    "messages": "chats: every answer of the assistant is trained",
    "conversations": "chats: every answer of the assistant is trained",
    "prompt": "prompts and completions: the completion is trained",
    "instruction": "instructions and outputs: the output is trained",
}
"""What rows are taken for, by the first column that they need; else for plain texts."""

CHATS = ("messages", "conversations", "instruction")


@dataclass(frozen=True)
class Look:
    """What rows are like.

    Attributes:
        name: of their file.
        rows: in all.
        columns: their names.
        form: what they are taken for, in words.
        chat: whether they go through the model's chat template.
        lengths, trained: tokens, and trained tokens, of each example looked at.
        positions: the most tokens that the model has positions for; None: not known.
        sampled: whether only some rows were looked at.
        notes: what of them is lost or changed.
    """

    name: str
    rows: int
    columns: tuple[str, ...]
    form: str
    chat: bool
    lengths: np.ndarray
    trained: np.ndarray
    positions: int | None = None
    sampled: bool = False
    notes: tuple[str, ...] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return int(self.lengths.max())

    def cut(self, max_length: int) -> int:
        """Examples looked at that are longer."""
        return int((self.lengths > max_length).sum())

    @property
    def max_length(self) -> int:
        """The smallest of `LENGTHS` that cuts next to none, within the model's positions."""
        few = (n for n in LENGTHS if self.cut(n) <= LOST * len(self.lengths))
        return min(next(few, LENGTHS[-1]), self.positions or LENGTHS[-1])

    def worst(self, max_length: int) -> Batch:
        """The largest batch of one row; one that was not looked at may be as long as it can."""
        tokens = max_length if self.sampled else min(self.longest, max_length)
        return Batch(1, tokens, None if self.sampled else int(self.trained.max()))

    def histogram(self, width: int = 40) -> list[str]:
        """Bars of how many examples have how many tokens."""
        inner = [edge for edge in (64, 128, *LENGTHS) if edge < self.longest]
        edges = [0, *inner, self.longest]
        found = [
            (low + 1, high, int(((self.lengths > low) & (self.lengths <= high)).sum()))
            for low, high in pairwise(edges)
        ]
        most = max(number for *_, number in found)
        return [
            f"{f'{low:,}–{high:,}':>13}  {count(number):>6}  {bar(number, most, width)}".rstrip()
            for low, high, number in found
        ]

    def lines(self) -> list[str]:
        """All of it, in at most 80 columns."""
        looked = len(self.lengths)
        template = "the model's chat template" if self.chat else "no template: texts as they are"
        spread = f", of rows spread over all {count(self.rows)}" if self.sampled else ""
        return [
            _fitted(f"Rows  {self.name}: {count(self.rows)} with {', '.join(self.columns)}"),
            f"      {self.form}",
            f"      {template}",
            *(_fitted(f"      {note}") for note in self.notes),
            "",
            f"Tokens of {count(looked)} examples{spread}",
            *self.histogram(),
        ]


def look(model: str, data: str) -> Look:
    """Read and tokenize rows as a run would, at most `LOOKED_AT` of them.

    Args:
        model: whose tokenizer, template and positions are meant.
        data: a file, or a hub name.

    Raises:
        UserError: rows, tokenizer or configuration that cannot be used.
    """
    rows, positions = load_rows(data), positions_of(model)
    if has_images(rows) and takes_images(model):
        raise UserError(
            f"{data} has images, and settings are proposed for rows of text: write a file of "
            "settings yourself, and see the plan with leanlift train --dry_run."
        )
    sft = LiftSFTConfig(output_dir="unused", use_cpu=True, max_length=None)
    ready = RowsForTraining(load_tokenizer(model), sft, vocabulary_rows(model), end_tokens(model))
    first = "text"
    if not is_document(rows.column_names):
        first = ExampleReader("train", rows.column_names, ready.how.chat).shape.required[0]
    every = max(1, len(rows) // LOOKED_AT)
    sample = rows if every == 1 else rows.select(range(0, every * LOOKED_AT, every))
    with without_bars():
        made = token_rows(sample, ready.how)
    lengths, trained = lengths_of(made.data)
    return Look(
        Path(data).name,
        len(rows),
        tuple(rows.column_names),
        FORMS.get(first, "plain texts: all of a text is trained"),
        ready.how.chat and first in CHATS,
        lengths,
        trained,
        positions,
        every > 1,
        made.report.notes,
    )


def positions_of(model: str) -> int | None:
    """The most tokens that a model has positions for, by its configuration.

    Raises:
        UserError: there is none.
    """
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # each config class has its own ways to refuse
        said = first_line(error).rstrip(".")
        raise UserError(
            f"the model {model} cannot be read: {said}. Expected a checkpoint's directory, or a "
            "name on the hub, within reach or fetched before."
        ) from error
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


@contextmanager
def without_bars() -> Iterator[None]:
    """Without the bars of `datasets`, where something else says what goes on."""
    were = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were:
            datasets.enable_progress_bars()


def _fitted(line: str) -> str:
    return line if len(line) <= 80 else f"{line[:79]}…"
