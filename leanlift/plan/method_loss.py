"""What a step of TRL's other trainers computes, for a plan: their own code over fake tensors.

Where they score tokens without the whole logits (DPO, KTO, GRPO, RLOO), it is TRL's fused output
head that runs, so that its buffers are counted; where they make whole logits (ORPO, CPO), so does
this. A reference is computed after the policy, while what the policy keeps for its backward pass is
there. On a GPU TRL scores the completions' tokens alone, and here every token is, so a plan for one
says more than is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import add_fused_lm_head

from leanlift.layers.lm_head import Objective
from leanlift.methods import METHODS, SFT
from leanlift.model.hidden import base_of
from leanlift.plan.loss import loss_of_all_tokens, output_over_text

FUSED = ("log_probs", "entropy")
SCORED = ("dpo", "kto", "grpo", "rloo")
"""Methods whose trainers score tokens with TRL's fused head."""


def loss_of(method: str, objective: Objective) -> Callable[..., Tensor]:
    """What a planned step computes; see `fake.Loss`."""
    if method == SFT:
        return partial(loss_of_all_tokens, objective=objective)
    if method == "reward":
        return _reward
    if method in ("orpo", "cpo"):
        return _whole
    return partial(_fused, beside=METHODS[method].reference and not METHODS[method].generates)


def generating_of(method: str) -> Callable[..., Tensor] | None:
    """What generates while a method trains; None: nothing does."""
    return _generates if METHODS[method].generates else None


def _given(ids: Tensor, padded: bool) -> dict[str, Any]:
    given = {"input_ids": ids, "use_cache": False}
    return {**given, "attention_mask": torch.ones_like(ids)} if padded else given


def _fused(
    model: Any, ids: Tensor, labels: Tensor, beside: bool, padded: bool = False, **rest: Any
) -> Tensor:
    """Log-probabilities of all tokens; `beside`: and then those of a reference."""
    if not getattr(model, "_planned_head", False):
        add_fused_lm_head(model, outputs=FUSED)
        model._planned_head = True
    given = {**_given(ids, padded), "labels": labels, "fused_lm_head": True}
    policy = model(**given).log_probs
    total: Tensor = policy.sum()
    if beside:
        with torch.no_grad():
            reference = model(**given).log_probs
        total = (policy - reference).sum()
    return total


def _whole(model: Any, ids: Tensor, labels: Tensor, padded: bool = False, **rest: Any) -> Tensor:
    logits = output_over_text(model, _given(ids, padded)).logits[:, :-1]
    scores = logits.log_softmax(-1)
    chosen: Tensor = scores.gather(-1, labels[:, 1:, None]).sum()
    return chosen


def _reward(model: Any, ids: Tensor, labels: Tensor, padded: bool = False, **rest: Any) -> Tensor:
    hidden = output_over_text(base_of(model), _given(ids, padded)).last_hidden_state
    scored: Tensor = hidden[:, -1].float().sum()
    return scored


def _generates(
    model: Any, ids: Tensor, labels: Tensor, padded: bool = False, **rest: Any
) -> Tensor:
    """The last token of completions, with what the cache holds of all before it."""
    out = model(**{**_given(ids, padded), "use_cache": True, "logits_to_keep": 1})
    scores: Tensor = out.logits.float().sum()  # while the cache is there
    return scores
