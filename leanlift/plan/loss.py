"""The loss of a planned step: over as many tokens as are trained, whichever they are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from leanlift.layers.lm_head import (
    LIKELIHOOD,
    Finish,
    Objective,
    head_loss,
    next_tokens,
    whole_cost,
)
from leanlift.model import output_head
from leanlift.model.hidden import base_of
from leanlift.plan.pieces import first_tiles

PLAIN = Finish()


def loss_of_all_tokens(
    model: Any,
    ids: Tensor,
    labels: Tensor,
    objective: Objective = LIKELIHOOD,
    trained: int | None = None,
    padded: bool = False,
    finish: Finish | None = PLAIN,
    seen: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The loss with so many tokens trained, by default every one; `finish` as `planned_finish` has
    it. What is `seen` with the ids, and ids that stand for it, the model is given as they are.

    No bytes depend on which they are, nor on what labels are. A mask makes a difference only where
    rows are padded. The first tiles of a vocabulary stand for all of them.
    """
    places = torch.zeros(labels[:, 1:].numel() if trained is None else trained, dtype=torch.int64)
    given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if seen is not None:
        given.update(seen)
    elif padded:
        given["attention_mask"] = torch.ones_like(ids)
    head, one = output_head(model), torch.tensor(1.0)
    if head is None or finish is None:
        chosen, wanted = next_tokens(output_over_text(model, given).logits, labels, places)
        return whole_cost(chosen.float(), wanted, objective)
    hidden = output_over_text(
        base_of(model), given
    ).last_hidden_state  # beside its part, as in a run
    states, wanted = next_tokens(hidden, labels, places)
    head = first_tiles(finish.of(head), states)
    return head_loss(states, wanted, head, one, objective=objective).loss


TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
"""What some models that see want to know of each token while they train: 0 is one of text."""


def token_types_wanted(error: Exception) -> tuple[str, ...]:
    """Which of `TOKEN_TYPES` a model has just said to lack; none where it said something else."""
    found = re.search(r"\b(?:mm_)?token_type_ids\b", str(error))
    return (found[0],) if found and isinstance(error, ValueError) else ()


def output_over_text(model: Any, given: dict[str, Any]) -> Any:
    """What a model gives for a batch of text, told what its tokens are if it asks for that."""
    try:
        return model(**given)
    except ValueError as error:
        wanted = token_types_wanted(error)
        if not wanted:
            raise
        return model(**given, **{name: torch.zeros_like(given["input_ids"]) for name in wanted})
