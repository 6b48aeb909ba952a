"""A model beside what we would make of its hidden states: its logits, and its loss.

Tried on one tiny batch, as it is and with hidden states so large that a cap, a scale or another
norm must show; no model is told by its name. Where its logits are those of a plain head but for a
factor and a cap, these are measured, and taken to be the numbers of its configuration that they
are nearest to: a number that is measured has the batch's own rounding, and would be another one
after every step.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leanlift.errors import UserError, first_line
from leanlift.layers.lm_head import Finish, Head
from leanlift.model.hidden import base_of, few_ids, is_base_of_its_part

IGNORED = -100

LARGE = 60.0
"""Logits that no cap in use leaves as they are."""

SATURATED = 1000.0
"""Logits of which a cap in use leaves nothing but itself."""

ROUNDINGS = 4
"""Epsilons of the largest logit by which two ways of computing it may differ: the product, the
bias and the cap are each rounded once."""

ORDER = 2e-4
"""The same for sums in another order, as a share of the largest logit: in fp32 they are off by many
epsilons. A cap or a scale changes a large logit by its own size."""

NEAR = 2**-8
"""By which share of itself a number may be off that was measured."""


@dataclass(frozen=True)
class Compared:
    """A model beside the head over the hidden states of its base, on one tiny batch.

    Attributes:
        finish: what its logits are of the head's product; None: they are made in another way.
        same_loss: whether its loss is the cost of the next tokens, by its own logits.
    """

    finish: Finish | None
    same_loss: bool


@torch.no_grad()
def compared(
    model: Any, head: Head | None, autocast: AbstractContextManager[Any] | None = None
) -> Compared:
    """Whether a model's logits and loss are what we would make of its hidden states. Dropout is
    off meanwhile.

    Args:
        model: a causal LM.
        head: its output head without a scale or a cap; None: it has none that is known here.
        autocast: what a training step runs under.

    Raises:
        UserError: the model does not run.
    """
    was_training = model.training
    model.eval()
    try:
        with autocast or nullcontext():
            parts = [base_of(model)]
            plain = _Look.at(model, 1.0, parts)
            if plain.states is None and is_base_of_its_part(model):
                parts = [*parts[0].modules()][1:]
                plain = _Look.at(model, 1.0, parts)
            finish = None
            if head is not None:
                finish = _finish(model, head, plain, lambda gain: _Look.at(model, gain, parts))
            return Compared(finish, plain.same_loss)
    except Exception as error:  # each family fails in its own way
        raise UserError(
            f"this {type(model).__name__} does not compute with frozen weights in the place of its "
            f"own, tried on a few tokens: {type(error).__name__}, {first_line(error)}"
        ) from error
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class _Look:
    """One forward pass, with the hidden states that one of some parts gives multiplied.

    Attributes:
        states: those hidden states [T, d], as the model went on with them; None: not one of the
            parts was asked for some, or more than one was.
        logits: the model's [T, V].
        same_loss: whether the model's loss is the cost of the next tokens.
    """

    states: Tensor | None
    logits: Tensor
    same_loss: bool

    @classmethod
    def at(cls, model: Any, gain: float, parts: list[Any]) -> _Look:
        """Look at a model, the hidden states multiplied by `gain`."""
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
        logits, wanted = own.logits[:, :-1].float(), labels[:, 1:]
        cost = float(F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED))
        bound = max(ROUNDINGS * torch.finfo(own.logits.dtype).eps, ORDER) * max(cost, 1.0)
        same_loss = own.loss is not None and abs(float(own.loss) - cost) <= bound
        states = seen[0].flatten(0, -2) if len(seen) == 1 else None
        return cls(states, own.logits.flatten(0, -2), same_loss)

    def product(self, head: Head) -> Tensor | None:
        """The head's logits of the hidden states; None where they do not fit each other, or the
        model's own logits."""
        states = self.states
        if states is None or states.shape[-1] != head.weight.shape[1]:
            return None
        if torch.is_autocast_enabled(states.device.type):
            states = states.to(torch.get_autocast_dtype(states.device.type))
        rows = head.rows(0, head.weight.shape[0], states.dtype)
        ours = head.logits(head.product(states, rows), 0)
        return ours if ours.shape == self.logits.shape else None

    def agrees(self, head: Head) -> bool:
        """Whether the model's logits are the head's."""
        ours = self.product(head)
        if ours is None or self.states is None:
            return False
        largest = float(ours.abs().max())
        epsilon = max(torch.finfo(dtype).eps for dtype in (self.states.dtype, self.logits.dtype))
        bound = max(ROUNDINGS * epsilon, ORDER) * max(largest, 1.0)
        return bool((self.logits - ours).abs().max() <= bound)


def _finish(model: Any, head: Head, plain: _Look, look: Callable[[float], _Look]) -> Finish | None:
    """What a model makes of its head's product: looked for without a cap first, then with one."""
    entries, rows = plain.logits.shape[-1], None
    if entries < head.weight.shape[0]:
        rows = entries
    product = plain.product(Finish(rows=rows).of(head))
    if product is None:
        return None
    numbers = sorted(numbers_of(model))
    factor = _factor(plain.logits, product)
    reach = abs(factor) * float(product.abs().max())
    large = look(LARGE / max(reach, 1e-6))
    scale = _nearest(numbers, factor)
    finish = None if scale is None else Finish(scale, None, rows)
    if finish is not None and all(one.agrees(finish.of(head)) for one in (plain, large)):
        return finish
    cap = _nearest(numbers, float(look(SATURATED / max(reach, 1e-6)).logits.abs().max()))
    if cap is None:
        return None
    inside = plain.logits.abs() < 0.7 * cap  # where the cap can be undone
    uncapped = cap * (plain.logits[inside].double() / cap).atanh()
    scale = _nearest(numbers, _factor(uncapped, product[inside]))
    finish = None if scale is None else Finish(scale, cap, rows)
    if finish is not None and all(one.agrees(finish.of(head)) for one in (plain, large)):
        return finish
    return None


def _factor(logits: Tensor, product: Tensor) -> float:
    """By which a product is multiplied to come nearest to logits."""
    wanted, given = logits.double(), product.double()
    return float((wanted * given).sum() / given.square().sum().clamp_min(1e-30))


def _nearest(numbers: list[float], measured: float) -> float | None:
    """The number that was measured; None: none of these is near."""
    found = min(numbers, key=lambda number: abs(number - measured))
    return found if abs(found - measured) <= NEAR * abs(measured) else None


def numbers_of(model: Any) -> set[float]:
    """The positive numbers that a model or its configuration holds, as factors and divisors, also
    of its width; and 1."""
    config = model.config.get_text_config()
    width = getattr(config, "hidden_size", None)
    found = {1.0}
    for holder in (config, model.config, model, base_of(model)):
        for number in _numbers(vars(holder)):
            found |= {number, 1 / number}
            if isinstance(width, int):
                found |= {number / width, width / number}
    return found


def _numbers(values: dict[str, Any]) -> Iterator[float]:
    for value in values.values():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and 1e-6 < value < 1e6 and math.isfinite(value):
            yield float(value)
