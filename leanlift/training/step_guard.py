"""What happens to a gradient: the guard against NaN and infinity, and updates in the backward pass.

One hook per trained matrix sees each gradient as soon as it exists, before anything can scale it.
It only has the device find its largest magnitude. Those are compared and read once, before the
optimizer's step, and the gradients of a bad step are dropped. With updates in the backward pass the
hook also updates the matrix and frees the gradient: the update asks the device itself whether
everything of the step was finite so far, and is counted as a step of its matrix until the notes are
read. What was updated before a later gradient turned out bad stays updated then; after a bad *loss*
nothing is updated. Where a step has several micro-batches, gradients are added up until the last
one's backward pass: on the device, or of streamed state in a sum that comes and goes with its
block.

A finite gradient can be as bad. Adam squares it: above 1.8e19 the square is infinite in fp32, and
the entry never moves again (in 8 bits, its block of 256; after a refresh, whatever enters). And the
norm of a whole gradient overflows long before its entries do, which turns clipping into NaN. So a
step with an entry beyond `LARGEST_GRADIENT` is not applied, and norms are summed in fp64.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from leanlift.errors import UserError
from leanlift.model import lift_layers
from leanlift.optim import LARGEST_GRADIENT, SparseAdamW
from leanlift.processes import fine_everywhere, mean_, processes

logger = logging.getLogger("leanlift")


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The norm of all gradients together, fp64 [], on their device: it cannot overflow."""
    found = list(gradients)
    if not found:
        return torch.zeros(())
    norms = torch._foreach_norm(found, 2, dtype=torch.float64)  # few launches, as torch clips
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_to_norm_(gradients: list[Tensor], limit: float) -> Tensor:
    """Scale all gradients, in place, so that their norm is at most `limit`; nothing waits.

    Returns:
        The norm before, fp64 [].
    """
    norm = total_norm(gradients)
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor)
    return norm


class StepGuard:
    """Looks at losses and gradients, and decides for each step whether it is applied.

    Args:
        limit: steps in a row that are not applied before training stops.
        at_once: whether updates come before the end of a step, so that several processes must know
            of each other's losses before.

    Attributes:
        skipped: steps that were not applied, in all.
        fine: bool scalar on the device: whether the losses of the present step are finite, and what
            was updated before its end; None before any of it was seen.
        steps, passes: steps that have ended, and micro-batches that were seen, in all.
    """

    def __init__(self, limit: int, at_once: bool = False) -> None:
        self.limit = limit
        self.at_once = at_once
        self.skipped = 0
        self.fine: Tensor | None = None
        self.steps = self.passes = 0
        self._in_a_row = 0
        self._losses: list[Tensor] = []
        self._largest: dict[str, Tensor] = {}

    def see_loss(self, loss: Tensor) -> None:
        """Note whether a micro-batch's loss is finite, on the device."""
        self.passes += 1
        self._losses.append(loss.detach())
        finite = torch.isfinite(loss.detach())
        self._note(fine_everywhere(finite) if self.at_once else finite)

    def see_gradient(self, layer: str, gradient: Tensor) -> None:
        """Remember the largest magnitude of a layer's gradient: one pass over it. Of several in a
        step, which add up, the last one is what counts; what was not finite is not again."""
        self.see_largest(layer, torch.linalg.vector_norm(gradient, float("inf")))

    def see_largest(self, layer: str, largest: Tensor) -> None:
        """Remember the largest magnitude of a layer's gradient, a scalar on the device."""
        self._largest[layer] = largest

    def see_gradient_at_once(self, layer: str, gradient: Tensor) -> None:
        """The same of a gradient that is used before the step ends: `fine` says of it, too."""
        self.see_gradient(layer, gradient)
        self._note(self._largest[layer] <= LARGEST_GRADIENT)  # not where it is NaN

    def _all_fine(self) -> Tensor | None:
        """Whether all that was seen of the present step is finite: bool scalar on the device."""
        if self._largest:
            self._note((torch.stack(list(self._largest.values())) <= LARGEST_GRADIENT).all())
        return self.fine

    def _is_fine(self) -> bool:
        """Whether nothing was seen that is not finite, here or in another process."""
        fine = self._all_fine()
        if processes() == 1:
            return fine is None or bool(fine)
        fine = torch.ones((), dtype=torch.bool) if fine is None else fine
        return bool(fine_everywhere(fine.to(PartialState().device)))

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
        applied = self._is_fine()
        losses, largest = self._losses, self._largest
        fine_here = self.fine is None or (not applied and bool(self.fine))
        self.forget_step()
        if applied:
            self._in_a_row = 0
            return True
        bad_loss = next((float(loss) for loss in losses if not math.isfinite(loss)), None)
        bad = {
            layer: float(size)
            for layer, size in largest.items()
            if not bool(size <= LARGEST_GRADIENT)
        }
        self.skipped += 1
        self._in_a_row += 1
        problem = f"the loss is {bad_loss}" if bad_loss is not None else _what_is_wrong(bad)
        if fine_here:
            problem = "another process has a loss or gradient that is not finite"
        if bad:
            problem += f" (in the backward pass first seen at {next(iter(bad))})"
        if self._in_a_row >= self.limit:
            raise UserError(
                f"training stopped at step {step}: {problem}, and {self._in_a_row} step(s) in a "
                f"row could not be applied; {advice()}. Lower learning_rate, or look for a "
                "damaged row."
            )
        if self._in_a_row == 1:
            logger.warning(
                "Step %d is not applied: %s. Training goes on; should it happen again, lower "
                "learning_rate.",
                step,
                problem,
            )
        return False

    def forget_step(self) -> None:
        """Drop what was noted of the present step."""
        self._losses, self._largest, self.fine = [], {}, None
        self.steps += 1


def _what_is_wrong(bad: dict[str, float]) -> str:
    size = next(iter(bad.values()), math.nan)
    if not math.isfinite(size):
        return "a gradient is not finite"
    return f"a gradient reaches {size:.1e}, and its square is beyond what float32 can sum"


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """The values that a model trains, by layer."""
    return {name: layer.values for name, layer in lift_layers(model).items()}


class GradientHooks:
    """The hooks on the trained values of a model; `remove` takes them off again.

    Args:
        model: an attached model.
        guard: sees every gradient.
        optimizer: if given, updates each matrix in the backward pass; else gradients stay.
        is_last: whether the present micro-batch is the last one of its step.
    """

    def __init__(
        self,
        model: nn.Module,
        guard: StepGuard,
        optimizer: SparseAdamW | None = None,
        is_last: Callable[[], bool] = lambda: True,
    ) -> None:
        self.guard = guard
        self.optimizer = optimizer
        self.is_last = is_last
        self._step = guard.steps
        self._seen_in: dict[str, int] = {}
        self._waiting: dict[str, None] = {}
        self._updated: dict[str, Tensor | None] = {}
        self._layers = lift_layers(model)
        self._values = values_of(model)
        self._handles = [
            layer.values.register_post_accumulate_grad_hook(functools.partial(self._after, name))
            for name, layer in self._layers.items()
        ]

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()
        for layer in self._layers.values():
            layer.gradient_sum = None

    def check_same(self, model: nn.Module) -> None:
        """Refuse a model that trains other values than the optimizer has been given.

        Raises:
            UserError: it does.
        """
        now = values_of(model)
        if now.keys() != self._values.keys() or any(now[n] is not self._values[n] for n in now):
            raise UserError(
                "the model trains another adapter now, or another one's entries, than the "
                "optimizer was made for (set_adapter, load_adapter): set the first one again "
                "before its next step, or begin a new training."
            )

    def update_what_waits(self) -> None:
        """Update what the last micro-batch has given no gradient, and an earlier one has, as it may
        be with experts."""
        for name in list(self._waiting):
            self._layers[name].bring()
            self._update(name)

    def drop_step(self) -> None:
        """Free the gradients of a step that is not applied, and take back that it was counted."""
        for name, layer in self._layers.items():
            layer.values.grad = None
            if self.optimizer is not None and name in self._updated:
                allowed = self._updated[name]
                if allowed is not None and not bool(allowed):
                    self.optimizer.uncount_step(layer.values)

    def _check_first(self, layer: str) -> None:
        """Refuse a second gradient of a matrix in one micro-batch.

        Raises:
            UserError: the loss has gone through the model several times.
        """
        if self._step != self.guard.steps:
            self._step, self._seen_in, self._updated = self.guard.steps, {}, {}
        if layer in self._updated or self._seen_in.get(layer) == self.guard.passes:
            raise UserError(
                f"{layer} got a second gradient in one step, and optim_in_backward has updated it "
                "after the first: leave out optim_in_backward (and stream_state)."
            )
        self._seen_in[layer] = self.guard.passes

    def _after(self, name: str, values: Any) -> None:
        assert values.grad is not None
        if self.optimizer is None:
            self.guard.see_gradient(name, values.grad)
            return
        self._check_first(name)
        self._waiting[name] = None
        layer = self._layers[name]
        if layer.gradient_sum is not None:
            layer.gradient_sum.add_(values.grad)
            values.grad = None
            layer.wrote(updated=False)
        if self.is_last():
            self._update(name)

    def _update(self, name: str) -> None:
        """Update a matrix with what its gradients have added up to, and free that."""
        assert self.optimizer is not None
        layer = self._layers[name]
        values, summed = layer.values, layer.gradient_sum
        if summed is not None:
            values.grad = summed
        assert values.grad is not None
        mean_(values.grad)  # what is updated now nobody else adds up
        self.guard.see_gradient_at_once(name, values.grad)
        self._updated[name] = self.guard.fine
        self.optimizer.step_parameter(values, self.guard.fine)
        values.grad = None
        if summed is not None:
            summed.zero_()
        layer.wrote()
        del self._waiting[name]
