"""All rows of a run, made ready for TRL: what `leanlift train` does before it loads the base, and
what `LiftTrainer` does with rows that it is given."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset

from leanlift.data.dataset import TokenRows, token_rows
from leanlift.data.images import ImageRows, check_image_settings, image_rows
from leanlift.data.lengths import Cut, check_row_settings, say, skips_preparation
from leanlift.data.mixture import mixed
from leanlift.data.stream import check_long_enough, token_stream
from leanlift.data.tokenizer import prepare_tokenizer
from leanlift.data.tokens import IGNORED, Tokenization
from leanlift.errors import UserError, first_line
from leanlift.rows.examples import columns_of
from leanlift.rows.files import is_document
from leanlift.rows.images import image_column
from leanlift.rows.mixture import Mixture
from leanlift.rows.source import Row

logger = logging.getLogger("leanlift")

Rows: TypeAlias = Dataset | IterableDataset | list[Row] | Mixture | TokenRows | ImageRows
"""What is trained and evaluated on."""


class RowsForTraining:
    """Tokenizes the rows of a run as its settings want it.

    Args:
        tokenizer: of the base; `prepare_tokenizer` is applied to it.
        sft: an `SFTConfig`.
        embedding: rows of the base's embedding; None: not known.
        ends: end tokens of the base's generation config.
        format: a function that makes a text of a row, as TRL's `formatting_func`.
        processor: of images, which rows may have then.
        sees: whether the model takes images, so that rows of text beside it are another kind.

    Raises:
        UserError: settings that exclude each other, or that the tokenizer cannot have.
    """

    def __init__(
        self,
        tokenizer: Any,
        sft: Any,
        embedding: int | None = None,
        ends: Any = None,
        format: Callable[[Row], str] | None = None,
        processor: Any = None,
        sees: bool = False,
    ) -> None:
        check_row_settings(sft)
        if format is not None and sft.completion_only_loss:
            raise UserError(
                "formatting_func makes texts, which have no completion for completion_only_loss to "
                "train alone: leave one of the two out."
            )
        prepare_tokenizer(tokenizer, sft, embedding)
        how = Tokenization.of(tokenizer, sft, embedding, ends)
        self.how = how if format is None else replace(how, text_field="text")
        self.sft, self.format, self.processor = sft, format, processor
        self._sees = sees or processor is not None
        self._with_images: bool | None = None

    @property
    def images(self) -> bool:
        """Whether rows with images can be among these."""
        return self.processor is not None

    def train(self, rows: Any) -> Any:
        """Rows to train on; see `__call__`. Of a stream, as many as a step takes are looked at."""
        made = self(rows, "train", self.sft.packing)
        if isinstance(made, IterableDataset) and not skips_preparation(self.sft):
            check_long_enough(made, self.sft, "train")
        return made

    def eval(self, rows: Any) -> Any:
        """Rows to evaluate on, or several datasets by name; None stays None."""
        packing = self.sft.packing if self.sft.eval_packing is None else self.sft.eval_packing
        if isinstance(rows, dict):
            return {name: self(part, name, packing) for name, part in rows.items()}
        return None if rows is None else self(rows, "eval", packing)

    def __call__(self, rows: Any, name: str, packing: bool) -> Any:
        """`TokenRows` of a `Dataset` or list, said what became of them; a stream of tokens of a
        stream; one of the two of a mixture; with skip_prepare_dataset, and for `TokenRows`, what
        was given.

        Raises:
            UserError: rows that cannot be used.
        """
        if isinstance(rows, (TokenRows, ImageRows)):
            return rows
        if isinstance(rows, Mixture):
            places = zip(rows.parts, rows.names, strict=True)
            parts = [self(part, f"{name} ({place})", packing) for part, place in places]
            return mixed(parts, rows, name, self.sft.data_seed or self.sft.seed)
        if self._have_images(rows, name):
            check_image_settings(self.sft, self.format)
            return image_rows(rows, self.processor, name, self.how)
        if skips_preparation(self.sft):
            _check_prepared(rows, name)
            return rows
        is_text = isinstance(rows, Dataset) and is_document(rows.column_names)
        if is_text and (self.how.assistant_only or self.how.completion_only):
            raise UserError(
                f"the {name} dataset is a text, and completion_only_loss and assistant_only_loss "
                "train a part of a row alone: leave them out."
            )
        if self.format is not None and not is_text:
            rows = formatted(rows, self.format, name)
        cut = Cut.of(self.sft, packing)
        if isinstance(rows, IterableDataset):
            return token_stream(rows, self.how, name, cut)
        made = token_rows(rows, self.how, name, cut, self.sft.dataset_num_proc)
        say(made.report, self.how)
        return made

    def _have_images(self, rows: Any, name: str) -> bool:
        """Whether rows are such with images; one run has such rows, or others.

        Raises:
            UserError: it has both.
        """
        found = self._sees and has_images(rows)
        before, self._with_images = self._with_images, found
        if before not in (None, found):
            raise UserError(
                f"the {name} dataset has {'' if found else 'no '}images, unlike the one before it: "
                "expected rows of one kind."
            )
        return found


def has_images(rows: Any) -> bool:
    """Whether rows have a column of images."""
    if isinstance(rows, ImageRows):
        return True
    if isinstance(rows, Mixture):
        return any(map(has_images, rows.parts))
    if isinstance(rows, (Dataset, IterableDataset)):
        return image_column(columns_of(rows)) is not None
    plain = isinstance(rows, (list, tuple))
    return plain and any(isinstance(row, dict) and image_column(row) for row in rows)


def _check_prepared(rows: Any, name: str) -> None:
    """Rows that go to the collator as they are."""
    if isinstance(rows, (Dataset, IterableDataset)):
        found: Row = next(iter(rows), {})
        if {"input_ids", "labels"} <= found.keys():
            return
    raise UserError(
        f"skip_prepare_dataset takes rows as they are, and the {name} dataset is not tokenized: "
        "expected a Dataset with input_ids and labels."
    )


def formatted(rows: Any, function: Callable[[Row], str], name: str) -> Any:
    """Rows as texts, by a function of the user's.

    Args:
        rows: a `Dataset`, stream or list of dicts.
        function: makes a text of a row.
        name: "train" or "eval", for messages.
    """

    def text(row: Row, number: int) -> Row:
        try:
            made = function(row)
        except Exception as error:  # whatever the user's own code raises
            raise UserError(
                f"formatting_func fails on row {number} of the {name} dataset with "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error
        if not isinstance(made, str):
            raise UserError(
                f"formatting_func returned a {type(made).__name__} for row {number} of the {name} "
                "dataset: expected a text."
            )
        return {"text": made}

    if isinstance(rows, IterableDataset):
        return rows.map(text, with_indices=True, remove_columns=columns_of(rows)).select_columns(
            ["text"]
        )
    return [text(row, number) for number, row in enumerate(rows)]


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
