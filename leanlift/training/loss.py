"""The training loss: through the tiled output head where that is the model's own loss.

TRL's own fused head wants a dense weight and works in buffers of 32,768 vocabulary entries per
token. The tiled loss takes a head in any storage format, and only the tokens that are trained.
It holds for models whose logits are the last hidden states times the head's weight, capped at
most. Whether a model is one of those is not told from its name: one tiny batch has to give the
model's own logits and loss, once as they are and once with hidden states so large that a cap, a
scale or another norm must show. Where it does not, whole logits are made, by the model itself.

Label smoothing and dynamic fine-tuning (`loss_type="dft"`) are other costs per token in the same
tiles, not other losses.
"""

from __future__ import annotations

import inspect
import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from leanlift.errors import UserError
from leanlift.layers.lm_head import Head, Objective, head_loss, next_tokens, whole_cost
from leanlift.model import output_head

logger = logging.getLogger("leanlift")

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


class TrainingLoss(Protocol):
    """What `LiftTrainer` computes; `last` is of the last batch, None before the first."""

    last: LossParts | None

    def __call__(self, model: Any, inputs: dict[str, Any], items: Any = None) -> Tensor:
        """Loss over `items` tokens, or over those of this batch.

        Args:
            model: an attached causal LM.
            inputs: a batch with `input_ids` and `labels` [B, S]; -100 is not trained. What
                `MarkTrained` adds is looked up if it is missing.
            items: trained tokens of the whole accumulated batch.
        """
        ...


class TiledLoss:
    """Cost of the next tokens over the trained ones, from a model's hidden states."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.last: LossParts | None = None

    def __call__(self, model: Any, inputs: dict[str, Any], items: Any = None) -> Tensor:
        hidden = model.base_model(**forwarded(inputs)).last_hidden_state
        states, wanted = _trained(hidden, inputs)
        trained = max(1, wanted.numel())
        head = output_head(model)
        assert head is not None
        divisor = trained if items is None else items
        parts = head_loss(states, wanted, head, divisor, objective=self.objective)
        self.last = LossParts(parts.entropy / trained, parts.correct / trained)
        return parts.loss


class WholeLoss:
    """The same from the logits that the model itself makes, of all tokens at once."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.last: LossParts | None = None

    def __call__(self, model: Any, inputs: dict[str, Any], items: Any = None) -> Tensor:
        logits, wanted = _trained(model(**forwarded(inputs)).logits, inputs)
        trained = max(1, wanted.numel())
        with torch.no_grad():
            chances = logits.float().log_softmax(-1)
            entropy = -(chances.exp() * chances).sum()
            correct = (logits.argmax(-1) == wanted).sum()
            del chances
        self.last = LossParts(entropy / trained, correct / trained)
        divisor = trained if items is None else items
        return whole_cost(logits.float(), wanted, self.objective) / divisor


def forwarded(inputs: dict[str, Any]) -> dict[str, Any]:
    """What of a batch a model is given."""
    given = {key: value for key, value in inputs.items() if key not in ("labels", TRAINED)}
    return {**given, "use_cache": False}


def _trained(outputs: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Of outputs [B, S, d] those whose next token is trained, [T, d], and that token, [T]."""
    labels, places = inputs["labels"], inputs.get(TRAINED)
    if places is None:
        places = trained_positions(labels)
    # they are there already, unless a loop left them behind
    return next_tokens(outputs, labels, places.to(outputs.device))


def training_loss(
    model: Any, args: Any, custom: Any, autocast: AbstractContextManager[Any] | None = None
) -> TrainingLoss | None:
    """What a model is trained on; None where TRL's own way is needed: a loss function of the
    user's, or a router's auxiliary loss.

    Args:
        model: an attached causal LM, on its device.
        args: an SFTConfig.
        custom: the user's loss function, or None.
        autocast: what the training step runs under.

    Raises:
        UserError: a router's loss beside a head whose logits TRL cannot make.
    """
    if custom is not None:
        return None
    head = output_head(model)
    plain = head is not None and is_own_loss(model, head, autocast)
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        if not plain:
            raise UserError(
                f"the logits of this {type(model).__name__} are not its hidden states times its "
                "head's weight, which the auxiliary loss of its router cannot be trained with: set "
                "router_aux_loss_coef=0."
            )
        return None
    objective = objective_of(args)
    if plain:
        return TiledLoss(objective)
    logger.warning(
        "The logits of this %s are not its hidden states times its head's weight: they are made "
        "whole, which takes more memory.",
        type(model).__name__,
    )
    return WholeLoss(objective)


def objective_of(args: Any) -> Objective:
    """What a token costs under an SFTConfig."""
    if getattr(args, "loss_type", "nll") == "dft":
        return Objective(by_confidence=True)
    return Objective(smoothing=getattr(args, "label_smoothing_factor", 0.0))


LARGE = 60.0
"""Logits that no cap in use leaves as they are."""

ROUNDINGS = 4
"""Epsilons of the largest logit by which two ways of computing it may differ: the product, the
bias and the cap are each rounded once."""

ORDER = 2e-4
"""The same for sums in another order, as a share of the largest logit: in fp32 they are off by many
epsilons. A cap or a scale changes a large logit by its own size."""


@torch.no_grad()
def is_own_loss(
    model: Any, head: Head, autocast: AbstractContextManager[Any] | None = None
) -> bool:
    """Whether a model's logits and loss are those of `head` over the hidden states of its base, on
    one tiny batch. Dropout is off meanwhile."""
    device = next(model.parameters()).device
    ids = (torch.arange(18, device=device) * 7 + 3).view(2, 9) % min(97, head.weight.shape[0])
    labels = ids.clone()
    labels[:, :3] = IGNORED
    was_training = model.training
    model.eval()
    try:
        with autocast or nullcontext():
            largest = _agree(model, head, ids, labels, 1.0)
            if largest is None:
                return False
            return _agree(model, head, ids, labels, LARGE / max(largest, 1e-6)) is not None
    finally:
        model.train(was_training)


def _agree(model: Any, head: Head, ids: Tensor, labels: Tensor, gain: float) -> float | None:
    """The largest logit, with the base's hidden states multiplied by `gain`; None where the model
    and the head give other logits or another loss, or the base was not asked."""
    seen: list[Tensor] = []

    def enlarge(module: Any, args: Any, output: Any) -> Any:
        hidden = getattr(output, "last_hidden_state", None)
        if hidden is not None:
            seen.append(hidden * gain)
            output.last_hidden_state = seen[-1]
        return output

    handle = model.base_model.register_forward_hook(enlarge)
    try:
        routed = "output_router_logits" in inspect.signature(model.forward).parameters
        without = {"output_router_logits": False} if routed else {}  # its loss comes on top
        own = model(input_ids=ids, labels=labels, use_cache=False, **without)
    finally:
        handle.remove()
    if len(seen) != 1 or own.loss is None:
        return None
    hidden = seen[0]
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    flat = hidden.reshape(-1, hidden.shape[-1])
    ours = head.logits(flat, head.rows(0, head.weight.shape[0], hidden.dtype), 0)
    largest = float(ours.abs().max())
    epsilon = max(torch.finfo(dtype).eps for dtype in (hidden.dtype, own.logits.dtype))
    bound = max(ROUNDINGS * epsilon, ORDER) * max(largest, 1.0)
    states, wanted = _trained(ours.view(*hidden.shape[:-1], -1), {"labels": labels})
    loss = F.cross_entropy(states, wanted)
    same = (own.logits.reshape(ours.shape) - ours).abs().max() <= bound
    return largest if bool(same) and abs(float(own.loss) - float(loss)) <= bound else None
