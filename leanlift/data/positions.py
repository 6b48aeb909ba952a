"""How many positions a model has, held against what it is to read.

Where positions are looked up in a table, one beyond its end is an index error, or on a GPU a device
assert. Where they are computed, a longer text than the base was made for goes through, and may mean
little: that is said.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from leanlift.errors import UserError

logger = logging.getLogger("leanlift")

SPARE = 4
"""Rows that a table of positions may have more than there are positions."""


def check_positions(model: Any, longest: int, what: str, advice: str) -> None:
    """Refuse, or warn of, more tokens than a model has positions.

    Args:
        model: a causal LM, stock or attached.
        longest: tokens that it is to read at once.
        what: whose they are, for messages.
        advice: what to do.

    Raises:
        UserError: it looks positions up, and has fewer.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return
    table = _table_size(model, limit)
    if table is not None and longest > table:
        raise UserError(
            f"{what} has {longest} tokens, and the base has a table of {table} positions: {advice}."
        )
    if longest > limit:
        logger.warning(
            "%s has %d tokens, and the base was made for %d positions.", what, longest, limit
        )


def _table_size(model: Any, limit: int) -> int | None:
    """Positions in a model's table of them; None: it computes them."""
    words = model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not words:
            first = getattr(module, "offset", 0)
            if module.padding_idx is not None:  # positions are counted from behind it
                first = module.padding_idx + 1
            if limit <= module.num_embeddings <= limit + SPARE:
                return int(module.num_embeddings - first)
    return None
