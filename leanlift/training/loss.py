"""The training loss: through the tiled output head where that is the model's own loss.

TRL's own fused head wants a dense weight and works in buffers of 32,768 vocabulary entries per
token. The tiled loss takes a head in any storage format, and only the tokens that are trained.
It holds for models whose logits are the last hidden states times the head's weight, scaled and
capped at most. Whether a model is one of those is not told from its name: one tiny batch has to
give the model's own logits, once as they are and once with hidden states so large that a cap or
another norm must show. Where it does not, whole logits are made, by the model itself. What is
trained on is the cost of the next tokens, as in TRL; a model whose own loss is another (some do
not shift their labels, some add to it) is told apart on the same batch, and that is said.

The auxiliary loss of a router is off unless `router_aux_loss_coef` is set: routers are frozen.

Label smoothing and dynamic fine-tuning (`loss_type="dft"`) are other costs per token in the same
tiles, not other losses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from leanlift.errors import UserError, first_line
from leanlift.layers import LiftLinear, TiedHead
from leanlift.layers.lm_head import Finish, Objective, head_loss, next_tokens, whole_cost
from leanlift.model import lift_layers, lifted, output_head
from leanlift.model.hidden import base_of, few_ids
from leanlift.model.targets import beyond_text
from leanlift.plan.loss import token_types_wanted
from leanlift.training.own_loss import IGNORED, compared

logger = logging.getLogger("leanlift")

TRAINED = "trained_positions"

NAME_OTHERS = "Name others, or train on rows with images."
"""What to do where text reaches nothing that is trained."""


@dataclass(frozen=True)
class LossParts:
    """Averages over the trained tokens of a batch, scalars on its device: whoever reads them makes
    the host wait."""

    mean_entropy: Tensor
    accuracy: Tensor


class MarkTrained:
    """A data collator that also says which tokens are trained, as `trained_positions` does.

    It runs where batches are made, on the CPU: to ask the device would make the host wait for it.
    What else is asked of it, the collator it is made around answers. Rows of text get the `types`
    of tokens that a model wants to have.
    """

    def __init__(self, collator: Any, types: tuple[str, ...] = ()) -> None:
        self.collator, self.types = collator, types

    def __call__(self, examples: Any) -> Any:
        batch = self.collator(examples)
        labels = batch.get("labels")
        if isinstance(labels, Tensor) and labels.dim() == 2:
            batch[TRAINED] = trained_positions(labels)
        if self.types:
            batch.update(_of_text(batch, self.types))
        return batch

    def __getattr__(self, name: str) -> Any:
        if name in ("collator", "types"):  # not there yet: while it is unpickled
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
    """Cost of the next tokens over the trained ones, from a model's hidden states.

    Args:
        objective: what a token costs.
        finish: what the model makes of its head's product.
    """

    def __init__(self, objective: Objective, finish: Finish) -> None:
        self.objective = objective
        self.finish = finish
        self.last: LossParts | None = None

    def __call__(self, model: Any, inputs: dict[str, Any], items: Any = None) -> Tensor:
        hidden = base_of(model)(**forwarded(inputs)).last_hidden_state
        states, wanted = _trained(hidden, inputs)
        trained = max(1, wanted.numel())
        head = output_head(model)
        assert head is not None
        divisor = trained if items is None else items
        finished = self.finish.of(head)
        parts = head_loss(states, wanted, finished, divisor, objective=self.objective)
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
        UserError: a router's loss that TRL, or the model itself, cannot make.
    """
    if custom is not None:
        return None
    model = lifted(model)
    head = output_head(model)
    found = compared(model, head, autocast)
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        _check_router_loss(model, found.finish)
        return None
    objective, kind = objective_of(args), type(model).__name__
    if not found.same_loss:
        logger.warning(
            "What this %s gives as its loss is not the cost of the next tokens, or not that alone: "
            "that cost is what is trained on.",
            kind,
        )
    if found.finish is not None:
        return TiledLoss(objective, found.finish)
    logger.warning("%s they are made whole, which takes more memory.", _why_whole(model))
    return WholeLoss(objective)


def _why_whole(model: Any) -> str:
    """Why the logits of a model are no product that can be made by tiles, up to a colon."""
    head, logits = model.get_output_embeddings(), f"The logits of this {type(model).__name__}"
    if isinstance(head, LiftLinear):
        return f"{logits} come from a head that is trained (modules_to_save):"
    if isinstance(head, TiedHead):
        return f"{logits} come from a tied head with trained rows (trainable_token_indices):"
    return f"{logits} are not its hidden states times its head's weight:"


def _check_router_loss(model: Any, finish: Finish | None) -> None:
    """Refuse an auxiliary loss that was asked for and that TRL, or the model itself, cannot make.

    Raises:
        UserError: says why, and how to go without.
    """
    kind, without = type(model).__name__, "set router_aux_loss_coef=0, or leave it out"
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if finish not in (Finish(), Finish(softcap=cap)):  # what TRL makes of them itself
        raise UserError(
            f"the logits of this {kind} are not its hidden states times its head's weight, which "
            f"the auxiliary loss of its router cannot be trained with: {without}."
        )
    ids = few_ids(model)
    try:
        with torch.no_grad():
            found = model(input_ids=ids, labels=ids, use_cache=False, output_router_logits=True)
        assert found.aux_loss is not None
    except Exception as error:  # each family fails in its own way
        raise UserError(
            f"this {kind} cannot make the auxiliary loss of its router, so {without}: "
            f"{type(error).__name__}, {first_line(error)}"
        ) from error


def objective_of(args: Any) -> Objective:
    """What a token costs under an SFTConfig."""
    if getattr(args, "loss_type", "nll") == "dft":
        return Objective(by_confidence=True)
    return Objective(smoothing=getattr(args, "label_smoothing_factor", 0.0))


def rehearse(
    model: Any,
    loss: TrainingLoss,
    autocast: AbstractContextManager[Any] | None = None,
    images: bool = False,
    packed: Callable[[list[dict[str, Any]]], Any] | None = None,
) -> tuple[str, ...]:
    """Take the loss of a few tokens as training will, in training mode and with a mask, or packed.

    Args:
        model: attached.
        loss: what is trained on.
        autocast: what training runs under.
        images: whether rows have some: they reach more than these tokens do.
        packed: what makes one row of several; None: rows are padded.

    Returns:
        The `TOKEN_TYPES` that the model wants to have.

    Raises:
        UserError: a model that does not run like that, or in which no gradient reaches what is
            trained: blocks that run as one operation of autograd may ask for a gradient of their
            input, and embeddings are frozen.
    """
    model = lifted(model)
    ids, was_training, types = few_ids(model), model.training, tuple[str, ...]()
    batch = _batch(ids, packed)
    devices = [ids.device] if ids.device.type == "cuda" else []
    model.train()
    try:
        with torch.random.fork_rng(devices), torch.enable_grad(), autocast or nullcontext():
            try:
                reached = loss(model, dict(batch)).requires_grad
            except ValueError as error:
                types = token_types_wanted(error)
                if not types:
                    raise
                reached = loss(model, {**batch, **_of_text(batch, types)}).requires_grad
    except Exception as error:  # each family fails in its own way
        rows = "rows" if packed is None else "packed rows"
        raise UserError(
            f"this {type(model).__name__} cannot be trained on {rows} of text, tried on a few "
            f"tokens: {type(error).__name__}, {first_line(error)}"
        ) from error
    finally:
        model.train(was_training)
        loss.last = None
    if not reached and not images:
        beyond = beyond_text(model, lift_layers(model))
        if beyond is not None:
            raise UserError(f"{beyond} {NAME_OTHERS}")
        raise UserError(
            f"the loss of this {type(model).__name__} does not depend on what is trained in a way "
            "that autograd could follow: its blocks are run as one operation over frozen inputs, "
            "which leanlift does not train."
        )
    return types


def _batch(ids: Tensor, packed: Callable[[list[dict[str, Any]]], Any] | None) -> dict[str, Any]:
    """Rows [B, S] as they come in training, none of them shorter than the others."""
    if packed is None:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    made = packed([{"input_ids": row} for row in ids.tolist()])
    return {
        key: part.to(ids.device) if isinstance(part, Tensor) else part for key, part in made.items()
    }


def _of_text(batch: Any, types: tuple[str, ...]) -> dict[str, Tensor]:
    """The types of a batch's tokens, all of them text, where it says nothing of them."""
    return {name: torch.zeros_like(batch["input_ids"]) for name in types if name not in batch}
