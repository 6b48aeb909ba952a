"""What an adapter with a new head is for: the class of its model, and a classifier's labels.

The base's own config.json knows nothing of a head that it has not; a merge says it there, so that
stock transformers loads what was trained.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from leanlift.errors import UserError

MOST_LABELS, LONGEST_LABEL = 100_000, 256
KINDS = (None, "regression", "single_label_classification", "multi_label_classification")
CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification")
HEAD = "score"
"""Ends of the names of classes whose head has a row per label, and what the head is called."""


@dataclass(frozen=True)
class Task:
    """The model that a head makes of a base.

    Attributes:
        architecture: the class of the model, as config.json names it.
        labels: of a classifier, in order.
        kind: config.json's problem_type.
    """

    architecture: str
    labels: tuple[str, ...]
    kind: str | None = None

    @classmethod
    def of(cls, model: Any) -> Task:
        """Of a live model."""
        names = getattr(model.config, "id2label", None) or {}
        labels = tuple(str(names[key]) for key in sorted(names, key=int))
        return cls(type(model).__name__, labels, getattr(model.config, "problem_type", None))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {
            "architecture": self.architecture,
            "labels": list(self.labels),
            "problem_type": self.kind,
        }

    @classmethod
    def from_dict(cls, data: Any) -> Task:
        """Back from `to_dict`; `data` may come from a file that anyone has written.

        Raises:
            UserError: a value that no task has.
        """
        known = isinstance(data, dict) and set(data) == {"architecture", "labels", "problem_type"}
        if (
            not known
            or not isinstance(data["architecture"], str)
            or not re.fullmatch(r"[A-Za-z]\w{0,127}", data["architecture"], re.ASCII)
            or not isinstance(data["labels"], list)
            or len(data["labels"]) > MOST_LABELS
            or not all(map(_is_label, data["labels"]))
            or data["problem_type"] not in KINDS
        ):
            raise UserError(f"expected the class of a model and its labels, got {data!r:.80}.")
        return cls(data["architecture"], tuple(data["labels"]), data["problem_type"])

    def check_rows(self, rows: Mapping[str, int]) -> None:
        """Refuse labels of which a classifier's head has more or fewer.

        Args:
            rows: of the new matrices, by name.

        Raises:
            UserError: the head has not a row per label.
        """
        for name, count in rows.items():
            head = self.architecture.endswith(CLASSIFIERS) and name.rpartition(".")[2] == HEAD
            if head and count != len(self.labels):
                raise UserError(
                    f"expected {name} to have a row for each of {len(self.labels)} labels, got "
                    f"{count} rows."
                )

    def put(self, config: dict[str, Any]) -> None:
        """Let config.json (as data, edited here) say so."""
        config["architectures"] = [self.architecture]
        config["id2label"] = {str(i): label for i, label in enumerate(self.labels)}
        config["label2id"] = {label: i for i, label in enumerate(self.labels)}
        if self.kind is not None:
            config["problem_type"] = self.kind

    def check(self, model: Any, directory: str) -> None:
        """Refuse a model that has another head.

        Raises:
            UserError: it is of another class.
        """
        if type(model).__name__ != self.architecture:
            raise UserError(
                f"{directory} is an adapter of a {self.architecture}, not of a "
                f"{type(model).__name__}: load the base as that."
            )


def _is_label(label: Any) -> bool:
    return isinstance(label, str) and len(label) <= LONGEST_LABEL and label.isprintable()
