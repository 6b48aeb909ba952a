"""What happens to a gradient: the guard against NaN and infinity, and updates in the backward pass.

One hook per trained matrix sees each gradient as soon as it exists. Ordinarily it only notes on
the device whether the gradient is finite; the note is read once, before the optimizer's step, and
the gradients of a bad step are dropped. With updates in the backward pass the hook reads it at
once, updates the matrix and frees the gradient. What was updated before a later gradient turned
out bad stays updated then; a bad *loss* is seen before the backward pass and nothing is applied.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from leanlift.errors import UserError
from leanlift.model import lift_layers
from leanlift.optim import SparseAdamW

logger = logging.getLogger("leanlift")


class StepGuard:
    """Looks at losses and gradients, and decides for each step whether it is applied.

    Args:
        limit: steps in a row that are not applied before training stops.

    Attributes:
        skipped: steps that were not applied, in all.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.skipped = 0
        self._in_a_row = 0
        self._loss: float | None = None
        self._layer: str | None = None
        self._finite: dict[str, Tensor] = {}

    @property
    def bad(self) -> bool:
        """Whether something of the present step is already known not to be finite."""
        return self._loss is not None or self._layer is not None

    def see_loss(self, loss: Tensor) -> None:
        if self._loss is None and not bool(torch.isfinite(loss)):
            self._loss = float(loss)

    def see_gradient(self, layer: str, gradient: Tensor, now: bool) -> None:
        """Note whether the gradient is finite; `now` reads the answer from the device."""
        finite = torch.isfinite(gradient).all()
        if not now:
            self._finite[layer] = finite
        elif self._layer is None and not bool(finite):
            self._layer = layer

    def end_step(self, step: int, advice: Callable[[], str]) -> bool:
        """Whether step number `step` may be applied; says once in a row if not.

        Args:
            step: counted from 1.
            advice: what to say of the last checkpoint, if training must stop.

        Raises:
            UserError: so many steps in a row were bad.
        """
        if self._finite and not bool(torch.stack(list(self._finite.values())).all()):
            self._layer = next(name for name, finite in self._finite.items() if not bool(finite))
        loss, layer = self._loss, self._layer
        self._loss, self._layer, self._finite = None, None, {}
        if loss is None and layer is None:
            self._in_a_row = 0
            return True
        self.skipped += 1
        self._in_a_row += 1
        problem = f"the loss is {loss}" if loss is not None else "a gradient is not finite"
        if layer is not None:
            problem += f" (in the backward pass first seen at {layer})"
        if self._in_a_row >= self.limit:
            raise UserError(
                f"training stopped at step {step}: {problem}, and {self._in_a_row} step(s) in a "
                f"row could not be applied; {advice()}. Lower learning_rate, or look for a "
                "damaged row."
            )
        if self._in_a_row == 1:
            logger.warning("Step %d is not applied: %s.", step, problem)
        return False


class GradientHooks:
    """The hooks on the trained values of a model; `remove` takes them off again.

    Args:
        model: an attached model.
        guard: sees every gradient.
        optimizer: if given, updates each matrix in the backward pass; else gradients stay.
    """

    def __init__(
        self, model: nn.Module, guard: StepGuard, optimizer: SparseAdamW | None = None
    ) -> None:
        self.guard = guard
        self.optimizer = optimizer
        self._handles = [
            layer.values.register_post_accumulate_grad_hook(functools.partial(self._after, name))
            for name, layer in lift_layers(model).items()
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _after(self, layer: str, values: Any) -> None:
        assert values.grad is not None
        in_backward = self.optimizer is not None
        if not (in_backward and self.guard.bad):
            self.guard.see_gradient(layer, values.grad, now=in_backward)
        if self.optimizer is not None:
            if not self.guard.bad:
                self.optimizer.step_parameter(values)
            values.grad = None
