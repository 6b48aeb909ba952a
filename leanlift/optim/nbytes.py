"""Bytes of the optimizers that a run can have, by the names that `optim` takes, from lengths alone.

State is what an optimizer keeps from step to step, an update what its step makes on top and lets go
again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from leanlift.errors import UserError
from leanlift.optim.moments import BLOCK, CHUNK, TABLES_NBYTES, EightBitMoments, adamw_nbytes

CHUNK_TENSORS = 9
"""fp32 chunks that a step of `SparseAdamW` makes at most: values, gradients, both moments, the
update, noise, and what quantizing takes."""

BNB_EIGHT_BIT_FROM = 4096
"""Entries from which bitsandbytes keeps a vector's moments in 8 bits."""


@dataclass(frozen=True)
class _Rule:
    """Bytes of one optimizer.

    Attributes:
        state: of it, over vectors of these lengths whose entries take so many bytes.
        update: of its step over them, on a GPU or not.
    """

    state: Callable[[Sequence[int], int], int]
    update: Callable[[Sequence[int], int, bool], int]


def optimizer_nbytes(optim: str, counts: Sequence[int], itemsize: int) -> int:
    """State of an optimizer.

    Args:
        optim: its name.
        counts: lengths of the vectors that it trains.
        itemsize: bytes of one of their entries.

    Raises:
        UserError: there is no rule for it.
    """
    return _rule(optim).state(counts, itemsize)


def moment_sizes(optim: str, count: int) -> list[int]:
    """Bytes of the tensors that hold the moments of a vector in `SparseAdamW`.

    Args:
        optim: "sparse_adamw" or "sparse_adamw_8bit".
        count: its length.
    """
    if optim == "sparse_adamw":
        return [4 * count, 4 * count]
    return [count, 4 * -(-count // BLOCK)] * 2


def update_nbytes(optim: str, counts: Sequence[int], itemsize: int, cuda: bool) -> int:
    """Temporaries of an optimizer's step; the arguments are those of `optimizer_nbytes`.

    Args:
        cuda: whether it is taken on a GPU, where torch's AdamW works on all vectors at once.
    """
    return _rule(optim).update(counts, itemsize, cuda)


def _rule(optim: str) -> _Rule:
    if optim not in _RULES:
        raise UserError(
            f"the memory of optim={optim} cannot be planned: expected one of {', '.join(_RULES)}."
        )
    return _RULES[optim]


def _torch_state(counts: Sequence[int], itemsize: int) -> int:
    return sum(4 + 2 * itemsize * count for count in counts)


def _torch_update(counts: Sequence[int], itemsize: int, cuda: bool) -> int:
    """On a CPU vectors take turns: two temporaries each, while one of the vector before is there
    still."""
    if cuda:
        return itemsize * sum(counts)
    turns = zip(counts, [0, *counts], strict=False)
    return itemsize * max(2 * own + before for own, before in turns)


def _sparse_state(counts: Sequence[int], itemsize: int) -> int:
    return sum(adamw_nbytes(count) for count in counts)


def _sparse_state_8bit(counts: Sequence[int], itemsize: int) -> int:
    return sum(adamw_nbytes(count, "8bit") for count in counts) + TABLES_NBYTES


def _sparse_update(counts: Sequence[int], itemsize: int, cuda: bool) -> int:
    return CHUNK_TENSORS * 4 * min(CHUNK, max(counts))


def _bnb_state_8bit(counts: Sequence[int], itemsize: int) -> int:
    small, codes = (count < BNB_EIGHT_BIT_FROM for count in counts), EightBitMoments()
    state = [
        8 * count if fp32 else codes.nbytes(count)
        for count, fp32 in zip(counts, small, strict=True)
    ]
    return sum(state) + (TABLES_NBYTES if max(counts) >= BNB_EIGHT_BIT_FROM else 0)


def _bnb_state_32bit(counts: Sequence[int], itemsize: int) -> int:
    return sum(8 * count for count in counts)


def _in_place(counts: Sequence[int], itemsize: int, cuda: bool) -> int:
    return 0


_RULES = {
    "adamw_torch": _Rule(_torch_state, _torch_update),
    "adamw_torch_fused": _Rule(_torch_state, _in_place),
    "sparse_adamw": _Rule(_sparse_state, _sparse_update),
    "sparse_adamw_8bit": _Rule(_sparse_state_8bit, _sparse_update),
    "adamw_8bit": _Rule(_bnb_state_8bit, _in_place),
    "adamw_bnb_8bit": _Rule(_bnb_state_8bit, _in_place),
    "paged_adamw_8bit": _Rule(_bnb_state_8bit, _in_place),
    "paged_adamw_32bit": _Rule(_bnb_state_32bit, _in_place),
}
