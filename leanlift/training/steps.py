"""What happens to a gradient: the guard against NaN and infinity, and updates in the backward pass.

One hook per trained matrix sees each gradient as soon as it exists. It only notes on the device
whether the gradient is finite. The notes are read once, before the optimizer's step, and the
gradients of a bad step are dropped. With updates in the backward pass the hook also updates the
matrix and frees the gradient: the update asks the device itself whether everything of the step was
finite so far, and is counted as a step of its matrix until the notes are read. What was updated
before a later gradient turned out bad stays updated then; after a bad *loss* nothing is updated.
"""

from __future__ import annotations

import functools
import logging
import math
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
        fine: bool scalar on the device: whether all that was seen of the present step is finite;
            None before anything was seen.
        unapplied: of the last step that ended, the layers whose gradient came when something was
            not finite, in the order in which they came.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.skipped = 0
        self.fine: Tensor | None = None
        self.unapplied: list[str] = []
        self._in_a_row = 0
        self._losses: list[Tensor] = []
        self._finite: dict[str, Tensor] = {}

    def see_loss(self, loss: Tensor) -> None:
        self._losses.append(loss.detach())
        self._note(torch.isfinite(loss.detach()))

    def see_gradient(self, layer: str, gradient: Tensor) -> None:
        finite = torch.isfinite(gradient).all()
        self._finite[layer] = finite
        self._note(finite)

    def _note(self, finite: Tensor) -> None:
        self.fine = finite if self.fine is None else self.fine & finite

    def end_step(self, step: int, advice: Callable[[], str]) -> bool:
        """Whether step number `step` may be applied; says once in a row if not. The one place where
        the host waits for the device.

        Args:
            step: counted from 1.
            advice: what to say of the last checkpoint, if training must stop.

        Raises:
            UserError: so many steps in a row were bad.
        """
        applied = self.fine is None or bool(self.fine)
        losses, finite = self._losses, self._finite
        self._losses, self._finite, self.fine, self.unapplied = [], {}, None, []
        if applied:
            self._in_a_row = 0
            return True
        bad_loss = next((float(loss) for loss in losses if not math.isfinite(loss)), None)
        bad_layers = [layer for layer, fine in finite.items() if not bool(fine)]
        layers = list(finite)
        first = layers.index(bad_layers[0]) if bad_layers else len(layers)
        self.unapplied = layers if bad_loss is not None else layers[first:]
        self.skipped += 1
        self._in_a_row += 1
        problem = "a gradient is not finite" if bad_loss is None else f"the loss is {bad_loss}"
        if bad_layers:
            problem += f" (in the backward pass first seen at {bad_layers[0]})"
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
        self._layers = lift_layers(model)
        self._handles = [
            layer.values.register_post_accumulate_grad_hook(functools.partial(self._after, name))
            for name, layer in self._layers.items()
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def drop_step(self) -> None:
        """Free the gradients of a step that is not applied, and take back that it was counted."""
        for name, layer in self._layers.items():
            layer.values.grad = None
            if self.optimizer is not None and name in self.guard.unapplied:
                self.optimizer.uncount_step(layer.values)

    def _after(self, layer: str, values: Any) -> None:
        assert values.grad is not None
        self.guard.see_gradient(layer, values.grad)
        if self.optimizer is not None:
            self.optimizer.step_parameter(values, self.guard.fine)
            values.grad = None
