"""A model beside what we would make of its hidden states: its logits, and its loss.

Tried on one tiny batch, once as it is and once with hidden states so large that a cap, a scale or
another norm must show; no model is told by its name.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leanlift.errors import UserError, first_line
from leanlift.layers.lm_head import Head
from leanlift.model import embedding_size

IGNORED = -100

LARGE = 60.0
"""Logits that no cap in use leaves as they are."""

ROUNDINGS = 4
"""Epsilons of the largest logit by which two ways of computing it may differ: the product, the
bias and the cap are each rounded once."""

ORDER = 2e-4
"""The same for sums in another order, as a share of the largest logit: in fp32 they are off by many
epsilons. A cap or a scale changes a large logit by its own size."""


@dataclass(frozen=True)
class Compared:
    """A model beside the head over the hidden states of its base, on one tiny batch.

    Attributes:
        same_logits: whether its logits are the head's.
        same_loss: whether its loss is the cost of the next tokens, by its own logits.
    """

    same_logits: bool
    same_loss: bool


@torch.no_grad()
def compared(
    model: Any, head: Head | None, autocast: AbstractContextManager[Any] | None = None
) -> Compared:
    """Whether a model's logits and loss are what we would make of its hidden states. Dropout is
    off meanwhile.

    Raises:
        UserError: the model does not run.
    """
    was_training = model.training
    model.eval()
    try:
        with autocast or nullcontext():
            parts = [model.base_model]
            plain = _Look(model, head, 1.0, parts)
            if not plain.asked and _is_base_of_its_part(model):
                parts = [part for part in model.base_model.modules() if part is not parts[0]]
                plain = _Look(model, head, 1.0, parts)
            same = plain.agrees
            if same:  # now with logits so large that a cap must show
                same = _Look(model, head, LARGE / max(plain.largest, 1e-6), parts).agrees
            return Compared(same, plain.same_loss)
    except Exception as error:  # each family fails in its own way
        raise UserError(
            f"this {type(model).__name__} does not compute with frozen weights in the place of its "
            f"own, tried on a few tokens: {type(error).__name__}, {first_line(error)}"
        ) from error
    finally:
        model.train(was_training)


def few_ids(model: Any) -> Tensor:
    """Ids [2, 9] that any vocabulary has, and that stand for nothing else than text."""
    device = next(model.parameters()).device
    text = model.config.get_text_config()
    sizes = embedding_size(model), getattr(text, "vocab_size", None)
    most = min(97, *(size for size in sizes if isinstance(size, int)))
    special = {
        value
        for name, value in (*vars(model.config).items(), *vars(text).items())
        if name.endswith(("_token_id", "_token_index"))
    }
    plain = [number for number in range(most) if number not in special] or [0]
    ids = [plain[(7 * place + 3) % len(plain)] for place in range(18)]
    return torch.tensor(ids, device=device).view(2, 9)


def _is_base_of_its_part(model: Any) -> bool:
    """Whether a base gives what the one decoder in it gives: some models ask that alone."""
    states: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        if hasattr(output, "last_hidden_state"):
            states.append(output.last_hidden_state)

    handles = [part.register_forward_hook(keep) for part in model.base_model.modules()]
    try:
        model.base_model(input_ids=few_ids(model), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return len(states) == 2 and states[0] is states[1]


class _Look:
    """One forward pass, with the hidden states that one of some parts gives multiplied by `gain`.

    Attributes:
        asked: whether one of them was asked for them, once.
        largest: the largest logit of the head; 0 where it was not asked.
        agrees: whether the model's logits are the head's.
        same_loss: whether the model's loss is the cost of the next tokens.
    """

    def __init__(self, model: Any, head: Head | None, gain: float, parts: list[Any]) -> None:
        ids = few_ids(model)
        labels = ids.clone()
        labels[:, :3] = IGNORED
        seen: list[Tensor] = []

        def enlarge(module: Any, args: Any, output: Any) -> Any:
            hidden = getattr(output, "last_hidden_state", None)
            if hidden is not None:
                seen.append(hidden * gain)
                output.last_hidden_state = seen[-1]
            return output

        handles = [part.register_forward_hook(enlarge) for part in parts]
        try:
            routed = "output_router_logits" in inspect.signature(model.forward).parameters
            without = {"output_router_logits": False} if routed else {}  # its loss comes on top
            own = model(input_ids=ids, labels=labels, use_cache=False, **without)
        finally:
            for handle in handles:
                handle.remove()
        self.largest, self.agrees, self.asked = 0.0, False, len(seen) == 1
        if head is not None and self.asked:
            self.largest, self.agrees = _same_logits(seen[0], head, own.logits)
        states, wanted = own.logits[:, :-1].float(), labels[:, 1:]
        cost = float(F.cross_entropy(states.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED))
        bound = max(ROUNDINGS * torch.finfo(own.logits.dtype).eps, ORDER) * max(cost, 1.0)
        self.same_loss = own.loss is not None and abs(float(own.loss) - cost) <= bound


def _same_logits(hidden: Tensor, head: Head, own: Tensor) -> tuple[float, bool]:
    """The head's largest logit, and whether its logits are those that the model made."""
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    flat = hidden.reshape(-1, hidden.shape[-1])
    if flat.shape[-1] != head.weight.shape[1]:
        return 0.0, False
    ours = head.logits(flat, head.rows(0, head.weight.shape[0], hidden.dtype), 0)
    if own.numel() != ours.numel():
        return 0.0, False
    largest = float(ours.abs().max())
    epsilon = max(torch.finfo(dtype).eps for dtype in (hidden.dtype, own.dtype))
    bound = max(ROUNDINGS * epsilon, ORDER) * max(largest, 1.0)
    return largest, bool((own.reshape(ours.shape) - ours).abs().max() <= bound)
