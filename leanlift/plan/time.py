"""How long a training step takes on a card: modelled from its work (`benchmarks/step_model`).

A card multiplies at a share of the rate of its sheet, and moves bytes at a share of its bandwidth;
what a step multiplies and what it moves add up, since its kernels run one after the other. What
comes over the bus comes meanwhile: of a pass, the longer of the two counts. The shares below are
assumptions, the same for all cards. A figure of this model is good for comparing settings; the
clock of a run says what a step takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from leanlift.plan.cards import Card
from leanlift.plan.work import Part, StepWork

PRODUCTS, ATTENTION, TRAFFIC, BUS = 0.6, 0.4, 0.75, 0.8
"""The shares of a sheet's figures that are reached: FLOP/s in products and in attention, bytes/s in
memory and over the bus."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer's step, all its micro-batches together.

    Attributes:
        card: whose.
        parts: seconds by part of the step.
        tokens: that it trains on.
    """

    card: Card
    parts: dict[str, float]
    tokens: int

    @property
    def seconds(self) -> float:
        """Of the step."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; see docs/plan.md."""
        return {
            "card": self.card.name,
            "modelled": True,
            "calibrated": self.card.measured,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "parts": self.parts,
        }


def step_time(work: StepWork, card: Card) -> StepTime:
    """How long a step takes on a card."""
    forward = _seconds(work.forward + work.loss, card)
    again, back = _seconds(work.recomputed, card), _seconds(work.backward, card)
    waiting = max(0.0, _over_bus(work.forward, card) - forward)
    waiting += max(0.0, _over_bus(work.backward, card) - again - back)
    parts = {
        "forward pass": _seconds(work.forward, card),
        "loss": forward - _seconds(work.forward, card),
        "recomputation": again,
        "backward pass": back,
        "waiting for the bus": waiting,
    }
    whole = {name: work.times * seconds for name, seconds in parts.items()}
    whole["optimizer's step"] = _seconds(work.optimizer, card)
    return StepTime(card, whole, work.times * work.tokens)


def _seconds(part: Part, card: Card) -> float:
    """Of what a card does itself. Figures that were measured are reached."""
    products, attention, traffic = (
        (1.0, ATTENTION / PRODUCTS, 1.0) if card.measured else (PRODUCTS, ATTENTION, TRAFFIC)
    )
    multiplied = part.products / products + part.attention / attention
    return multiplied / card.flops + part.traffic / (traffic * card.bandwidth)


def _over_bus(part: Part, card: Card) -> float:
    return part.bus / ((1.0 if card.measured else BUS) * card.bus)
