"""Rows that an embedding and its output head have beyond those of the base.

A chat template may bring tokens that the base has no rows for. Theirs are frozen like the others,
and a pure function of the base, so that a number is all that an adapter has to keep of them: a
live model, a merge and whoever loads the adapter make the same rows.

The mean of the base's rows alone would not do. The logit of a mean row is the mean of all logits,
so whatever is trained before it, its token has a probability of at most 1/V and is never the
greedy one: a new end token would never end a text. And all new tokens would be read and written
alike. So a row is the mean plus a signed sum of sixteen rows, over four, chosen by its number:

    row_i = mean + (W[p_1] + … + W[p_8] - W[p_9] - … - W[p_16]) / 4

whose mean and covariance are those of the base's rows. Sums are formed in fp64 by pairs in a fixed
order, which is the same on every machine, and rounded once.

Shapes: W [m, n], of an embedding or a head; a bias is m x 1.
"""

from __future__ import annotations

import hashlib
import re
import struct
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leanlift.errors import UserError
from leanlift.tiles import RowTiles, row_ranges

MOST_ADDED = 2**16
"""Rows beyond those of the base, at most."""

LARGEST = 2**31 - 1
BLOCK = 256
PICKED = 16


@dataclass(frozen=True)
class Grown:
    """What an adapter says of an embedding that has grown.

    Attributes:
        rows: of the embedding and the head, new ones included.
        head: the path of the output head in the model; the embedding is in the fingerprint.
    """

    rows: int
    head: str

    def to_dict(self) -> dict[str, Any]:
        """What adapter_config.json holds of it."""
        return {"embedding_rows": self.rows, "output_head": self.head}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Grown | None:
        """Back from `to_dict`, out of a larger object that anyone may have written; None where it
        does not speak of rows.

        Raises:
            UserError: values that no adapter has.
        """
        rows, head = data.get("embedding_rows"), data.get("output_head")
        if rows is None and head is None:
            return None
        if type(rows) is not int or not 1 <= rows <= LARGEST:
            raise UserError(f"expected embedding_rows as a number of rows, got {rows!r:.80}.")
        if not isinstance(head, str) or not re.fullmatch(r"\w+(\.\w+)*", head, re.ASCII):
            raise UserError(f"expected output_head as the name of a module, got {head!r:.80}.")
        return cls(rows, head)

    def check(self, have: int, what: str) -> None:
        """Refuse a number of rows that no base with `have` rows was grown to.

        Raises:
            UserError: it is no more than it has, or far more; begins with `what`.
        """
        if self.rows <= have:
            raise UserError(
                f"{what} says that the embedding has grown to {self.rows} rows, but the base's has "
                f"{have}: the adapter is damaged."
            )
        check_growth(self.rows, have, what)


def check_growth(rows: int, have: int, what: str) -> None:
    """Raises a UserError that begins with `what` where `rows` are far more than `have`."""
    if rows > have + MOST_ADDED:
        raise UserError(
            f"{what} wants {rows} rows in an embedding that has {have}: expected at most "
            f"{MOST_ADDED} more."
        )


def new_rows(weight: RowTiles, rows: int, dtype: torch.dtype) -> Tensor:
    """The rows that a matrix gets to have `rows` of them.

    Args:
        weight: W [m, n] of the base as it is loaded, 1 <= m < rows.
        rows: how many there will be.
        dtype: of the result.

    Returns:
        [rows - m, n], on the device of `weight`.
    """
    m, n = weight.shape
    total = torch.zeros(n, dtype=torch.float64, device=weight.device)
    for start, stop in row_ranges(m, BLOCK):
        total = total + _sum(weight.rows(start, stop).double())
    mean = total / torch.full_like(total, m)  # by a number, a GPU would multiply by its inverse
    made = []
    for number in range(m, rows):
        picked = [weight.rows(p, p + 1).double() for p in _picked(number, m)]
        plus, minus = _sum(torch.cat(picked[::2])), _sum(torch.cat(picked[1::2]))
        made.append((mean + (plus - minus) / PICKED**0.5).to(dtype))
    return torch.stack(made)


def _picked(number: int, m: int) -> list[int]:
    """Which of m rows make the row of this number; those at even places are added."""
    digest = hashlib.sha512(str(number).encode()).digest()
    return [word * m >> 32 for word in struct.unpack(f"<{PICKED}I", digest)]


def _sum(rows: Tensor) -> Tensor:
    """[k, n] -> [n], by halves: additions of whole rows have one result on every device."""
    while len(rows) > 1:
        half = len(rows) // 2
        rows = torch.cat([rows[:half] + rows[half : 2 * half], rows[2 * half :]])
    return rows[0]
