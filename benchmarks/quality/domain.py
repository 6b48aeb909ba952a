"""What a model is taught and asked: tokenized rows, ready to be batched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
PAD = 0


@dataclass(frozen=True)
class Rows:
    """N rows, padded on the right, where causal attention never looks back at it.

    Attributes:
        ids: token ids [N, T].
        labels: the same where a token is trained, -100 elsewhere [N, T].
    """

    ids: Tensor
    labels: Tensor

    @classmethod
    def of(cls, pairs: list[tuple[list[int], list[int]]], longest: int | None = None) -> Rows:
        """From prompts and completions as token ids; rows longer than `longest` lose their end."""
        whole = [(prompt + completion)[:longest] for prompt, completion in pairs]
        width = max(map(len, whole))
        ids = torch.full((len(pairs), width), PAD)
        labels = torch.full((len(pairs), width), IGNORED)
        for row, (tokens, (prompt, _)) in enumerate(zip(whole, pairs, strict=True)):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, len(prompt) : len(tokens)] = ids[row, len(prompt) : len(tokens)]
        return cls(ids, labels)

    def __len__(self) -> int:
        return len(self.ids)

    def batches(self, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
        """Shuffled batches without end, cut to their longest row; a seed gives one order."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self), generator=generator)
            for start in range(0, len(self) - size + 1, size):
                yield self.batch(order[start : start + size])

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        ids, labels = self.ids[rows], self.labels[rows]
        width = int((labels != IGNORED).any(0).nonzero().max()) + 1
        return {"input_ids": ids[:, :width], "labels": labels[:, :width]}


@dataclass(frozen=True)
class Domain:
    """A source that the base knows and a target that it is taught.

    Attributes:
        name: for tables and file names.
        vocabulary: token ids in all; 0 is padding.
        end: the end token's id.
        pretraining: seed -> endless batches of source rows.
        train, valid, test: target rows; the best learning rate is chosen on `valid`.
        source: held-out source rows by skill.
        answers: model -> share of right greedy answers on target rows, where exact match of the
            whole completion is no measure; None: it is one.
    """

    name: str
    vocabulary: int
    end: int
    pretraining: Callable[[int], Iterator[dict[str, Tensor]]]
    train: Rows
    valid: Rows
    test: Rows
    source: dict[str, Rows]
    answers: Callable[[Any], float] | None = None
