"""The training loss, through the tiled output head.

TRL's own fused head wants a dense weight and works in buffers of 32,768 vocabulary entries per
token. This loss takes a head in any storage format, and only the tokens that are trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leanlift.ends import head_loss
from leanlift.model import output_head

IGNORED = -100
TRAINED = "trained_positions"


@dataclass(frozen=True)
class LossParts:
    """Averages over the trained tokens of a batch, scalars on its device: whoever reads them makes
    the host wait."""

    mean_entropy: Tensor
    accuracy: Tensor


class MarkTrained:
    """A data collator that also says which tokens are trained, as `trained_positions` does.

    It runs where batches are made, on the CPU: to ask the device would make the host wait for it.
    What else is asked of it, the collator it is made around answers.
    """

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, examples: Any) -> Any:
        batch = self.collator(examples)
        labels = batch.get("labels")
        if isinstance(labels, Tensor) and labels.dim() == 2:
            batch[TRAINED] = trained_positions(labels)
        return batch

    def __getattr__(self, name: str) -> Any:
        if name == "collator":  # not there yet: while it is unpickled
            raise AttributeError(name)
        return getattr(self.collator, name)


def trained_positions(labels: Tensor) -> Tensor:
    """Where, in flattened [B, S], a hidden state is whose next token is trained: int64 [T]."""
    next_is_trained = torch.zeros_like(labels, dtype=torch.bool)
    next_is_trained[:, :-1] = labels[:, 1:] != IGNORED
    return next_is_trained.view(-1).nonzero().squeeze(1)


class TiledLoss:
    """Cross-entropy of next tokens over the trained ones, from a model's hidden states.

    Attributes:
        last: entropy and accuracy of the last batch; None before the first.
    """

    def __init__(self) -> None:
        self.last: LossParts | None = None

    def __call__(self, model: Any, inputs: dict[str, Any], items: Any = None) -> Tensor:
        """Loss over `items` tokens, or over those of this batch.

        Args:
            model: an attached causal LM.
            inputs: a batch with `input_ids` and `labels` [B, S]; -100 is not trained. What
                `MarkTrained` adds is looked up if it is missing.
            items: trained tokens of the whole accumulated batch.
        """
        rest = {key: value for key, value in inputs.items() if key not in ("labels", TRAINED)}
        hidden = model.base_model(**{**rest, "use_cache": False}).last_hidden_state
        labels, places = inputs["labels"], inputs.get(TRAINED)
        if places is None:
            places = trained_positions(labels)
        states = hidden.reshape(-1, hidden.shape[-1]).index_select(0, places)
        wanted = labels.reshape(-1).index_select(0, places + 1)
        trained = max(1, places.numel())
        head = output_head(model)
        assert head is not None
        parts = head_loss(states, wanted, head, trained if items is None else items)
        self.last = LossParts(parts.entropy / trained, parts.correct / trained)
        return parts.loss


def tiled_loss(model: Any, args: Any, custom: Any) -> TiledLoss | None:
    """A `TiledLoss`, or None where another loss was asked for or the head is not a plain one."""
    plain = getattr(args, "loss_type", "nll") in ("nll", "chunked_nll")
    router = getattr(model.config, "output_router_logits", False)
    smoothing = getattr(args, "label_smoothing_factor", 0.0)
    if not plain or custom is not None or router or smoothing or output_head(model) is None:
        return None
    return TiledLoss()


def loss_of_all_tokens(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """The same loss with every token trained, for planning: nothing depends on what labels are."""
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    head = output_head(model)
    assert head is not None
    flat = hidden.reshape(-1, hidden.shape[-1])
    return head_loss(flat, labels[:, 1:].reshape(-1), head, torch.tensor(1.0)).loss
