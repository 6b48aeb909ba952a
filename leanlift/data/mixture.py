"""Tokens of several places as those of one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from datasets import IterableDataset, concatenate_datasets, interleave_datasets

from leanlift.data.dataset import TokenRows
from leanlift.data.lengths import LengthReport
from leanlift.errors import UserError
from leanlift.rows.mixture import Mixture

logger = logging.getLogger("leanlift")


def mixed(made: Sequence[Any], mixture: Mixture, name: str, seed: int) -> Any:
    """One `TokenRows` of several, or one stream of several.

    Args:
        made: of each part, in order.
        mixture: the parts.
        name: "train" or "eval", for messages.
        seed: of what is drawn from streams.

    Raises:
        UserError: parts that do not go together.
    """
    if all(isinstance(part, TokenRows) for part in made):
        return _joined(made, mixture, name)
    if not all(isinstance(part, IterableDataset) for part in made):
        raise UserError(
            f"the {name} datasets {', '.join(mixture.names)} are not all rows of text: rows with "
            "images, and rows that are taken as they are, come from one place."
        )
    if mixture.shares is None:
        logger.warning(
            "%s: the streams of %s come one after the other; give each a fraction to have them "
            "mixed.",
            name,
            ", ".join(mixture.names),
        )
        return concatenate_datasets(list(made))
    shares = list(mixture.shares)
    return interleave_datasets(
        list(made), probabilities=shares, seed=seed, stopping_strategy="first_exhausted"
    )


def _joined(made: Sequence[TokenRows], mixture: Mixture, name: str) -> TokenRows:
    columns = [tuple(part.data.column_names) for part in made]
    for place, found in zip(mixture.names, columns, strict=True):
        if found != columns[0]:
            raise UserError(
                f"the rows of {mixture.names[0]} and of {place} are not tokenized alike: the ones "
                f"have {', '.join(columns[0])}, the others {', '.join(found)}."
            )
    reports = [part.report for part in made]
    report = LengthReport(
        name,
        rows=sum(each.rows for each in reports),
        longest=max(each.longest for each in reports),
        truncated=sum(each.truncated for each in reports),
        untrained=sum(each.untrained for each in reports),
        max_length=reports[0].max_length,
        split=reports[0].split,
        unended=sum(each.unended for each in reports),
        notes=tuple(
            f"{place}: {note}"
            for place, each in zip(mixture.names, reports, strict=True)
            for note in each.notes
        ),
    )
    return TokenRows(concatenate_datasets([part.data for part in made]), report)
