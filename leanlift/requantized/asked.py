"""What a model and its re-quantized form are asked, so that both can be compared."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, tensor

from leanlift.adapters import RUN_NAME, Adapter
from leanlift.data.dataset import load_rows
from leanlift.data.ready import has_images
from leanlift.data.tokenizer import end_tokens, load_tokenizer, vocabulary_rows
from leanlift.data.tokens import IGNORED, Tokenization
from leanlift.errors import UserError
from leanlift.evaluation.answers import Sample
from leanlift.evaluation.evaluate import to_samples
from leanlift.evaluation.verify import rows_to_ask
from leanlift.io.bounded import MOST_OF_A_STRANGER
from leanlift.io.tensors import read_json
from leanlift.requantized.runtime import Runtime
from leanlift.rows.images import COLUMNS, text_alone

ROWS = 32
"""Rows that the loss is measured on."""

TOKENS = 256
"""Most tokens of a row; what is longer is cut off."""

PROMPTS = 4
"""Rows whose logits are compared."""

ANSWERS = 8
"""Rows that are answered, greedily."""

NEW = 32
"""Tokens of an answer, at most."""


@dataclass(frozen=True)
class OwnRows:
    """Rows, and whose they are.

    Attributes:
        rows: a dataset or a list.
        facts: of the adapter's run.
        whose: what they are, in words.
    """

    rows: Any
    facts: dict[str, Any]
    whose: str


@dataclass(frozen=True)
class Asked:
    """What is asked.

    Attributes:
        samples: rows as tokens, none longer than `TOKENS`.
        tokenizer: of the model.
        ends: tokens that end an answer.
        whose: what the rows are, in words.
    """

    samples: Sequence[Sample]
    tokenizer: Any
    ends: Collection[int]
    whose: str

    @property
    def trained(self) -> int:
        """Tokens that count in the loss."""
        return sum(sample.trained for sample in self.samples)

    @property
    def answered(self) -> list[Sample]:
        """The rows that are answered: those with a prompt."""
        return [sample for sample in self.samples if sample.prompt][:ANSWERS]

    def texts(self) -> list[str]:
        """Some of the rows, special tokens and all, as texts to take apart again."""
        return [
            self.tokenizer.decode(sample.whole, clean_up_tokenization_spaces=False)
            for sample in self.samples[:PROMPTS]
        ]


@dataclass(frozen=True)
class Found:
    """What a model makes of `Asked`.

    Attributes:
        logits: of the first rows, fp32 [T, V] each.
        loss: mean of the trained tokens, in nats.
        answers: greedy ones, as tokens.
    """

    logits: list[Tensor]
    loss: float
    answers: list[list[int]]


def rows_of(adapter: Adapter, data: str | None) -> OwnRows:
    """The rows to ask: those named, else the run's own evaluation rows, else those trained on.

    Raises:
        UserError: nobody says which, or they cannot be read.
    """
    file = adapter.directory / RUN_NAME
    facts = read_json(file, MOST_OF_A_STRANGER) if file.is_file() else {}
    facts = facts if isinstance(facts, dict) else {}
    own = facts.get("eval_dataset_name")
    if data is None and isinstance(own, str) and own:
        split = str(facts.get("eval_dataset_split") or "test")
        return OwnRows(load_rows(own, split, "eval"), facts, "rows for evaluation")
    whose = "rows of the training data" if data is None else f"rows of {data}"
    return OwnRows(rows_to_ask(adapter, data)[0], facts, whose)


def asked_of(found: OwnRows, model: Path) -> Asked:
    """Rows as the tokens of a merged checkpoint.

    Raises:
        UserError: nothing of the rows is trained.
    """
    tokenizer = load_tokenizer(str(model))
    ends = end_tokens(str(model))
    how = Tokenization.as_trained(tokenizer, found.facts, vocabulary_rows(str(model)), ends)
    given = found.rows
    if has_images(given):
        given = given.remove_columns([name for name in COLUMNS if name in given.column_names])
    rows = [text_alone(row) for row in islice(given, ROWS)]
    samples = to_samples(rows, tokenizer, replace(how, asked=True), window=TOKENS)
    cut = [_cut(sample) for sample in samples[:ROWS]]
    samples = [sample for sample in cut if sample.trained]
    if not samples:
        raise UserError(
            f"none of the first {ROWS} rows has a trained token among its first {TOKENS}: name "
            "others with --data, or leave the check out with --no_verify."
        )
    return Asked(samples, tokenizer, how.ends, found.whose)


def ask(model: Runtime, asked: Asked) -> Found:
    """All of it."""
    return Found(
        logits_of(model, asked),
        loss_of(model, asked),
        [model.greedy(sample.prompt, NEW, asked.ends) for sample in asked.answered],
    )


def logits_of(model: Runtime, asked: Asked) -> list[Tensor]:
    """Of the first rows, [T, V] each."""
    return [model.logits(sample.whole) for sample in asked.samples[:PROMPTS]]


def loss_of(model: Runtime, asked: Asked) -> float:
    """Mean cross-entropy of the trained tokens, in nats."""
    total = 0.0
    for sample in asked.samples:
        labels = tensor(sample.labels[1:])
        found = model.logits(sample.whole)[:-1]
        total += float(F.cross_entropy(found, labels, ignore_index=IGNORED, reduction="sum"))
    return total / asked.trained


def _cut(sample: Sample) -> Sample:
    return replace(
        sample,
        prompt=sample.prompt[:TOKENS],
        whole=sample.whole[:TOKENS],
        labels=sample.labels[:TOKENS],
    )
