"""The loss of a planned step: over as many tokens as are trained, whichever they are."""

from __future__ import annotations

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
) -> Tensor:
    """The loss with so many tokens trained, by default every one; `finish` as `planned_finish` has
    it.

    No bytes depend on which they are, nor on what labels are. A mask makes a difference only where
    rows are padded. The first tiles of a vocabulary stand for all of them.
    """
    places = torch.zeros(labels[:, 1:].numel() if trained is None else trained, dtype=torch.int64)
    given = {"input_ids": ids, "use_cache": False}
    if padded:
        given["attention_mask"] = torch.ones_like(ids)
    head, one = output_head(model), torch.tensor(1.0)
    if head is None or finish is None:
        chosen, wanted = next_tokens(model(**given).logits, labels, places)
        return whole_cost(chosen.float(), wanted, objective)
    hidden = base_of(model)(**given).last_hidden_state  # alive beside its part, as in training
    states, wanted = next_tokens(hidden, labels, places)
    head = first_tiles(finish.of(head), *states.shape)
    return head_loss(states, wanted, head, one, objective=objective).loss
