"""A plan: bytes by category and phase, when they peak, and which cards have them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

CARDS_GIB = (4, 6, 8, 12, 16, 24, 48)
CONTEXT = int(0.55 * 2**30)
"""What a CUDA process takes before its first tensor, and what the allocator loses to
fragmentation: an allowance, from reports of 0.5 to 0.6 GiB."""

MOMENTS = {
    "forward pass": "in the forward pass",
    "loss": "in the loss over the vocabulary",
    "backward pass": "in the backward pass",
    "optimizer's step": "in the optimizer's step",
    "load": "while the base is loaded",
    "select": "while the trained entries are selected",
    "refresh": "while a refresh selects anew",
    "evaluate": "in an evaluation",
    "generate": "while rows are generated",
    "export": "in the merge",
}
"""The moments at which memory can peak: parts of a step and other phases, in words."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by category (of the training step) and by phase.

    Attributes:
        model: what was planned for.
        categories: the training step's bytes by category; together its peak.
        phases: peak of each phase. "export" runs on the CPU; beside a model that is there too it
            counts that, and is no peak of a card.
        step: what the parts of a step, and a selection, have on top of what stays. The backward
            pass and the optimizer's step include gradients.
        entries: trained entries.
        weights: weights of the base.
        holds_for: the settings that were planned for, by name.
        context: allowance for the CUDA context, in no other figure.
        notes: what the plan takes for granted.
        host: of the host's memory, what a streamed base has, and what is learned in it where that
            is streamed; on a CPU it is in the categories too.
        adapter: positions, offsets and retired entries, wherever they are.
        moments: the optimizer's state, wherever it is.
    """

    model: str
    categories: dict[str, int]
    phases: dict[str, int]
    step: dict[str, int]
    entries: int
    weights: int = 0
    holds_for: dict[str, Any] = field(default_factory=dict)
    context: int = CONTEXT
    notes: list[str] = field(default_factory=list)
    host: int = 0
    adapter: int = 0
    moments: int = 0

    @property
    def peak_phase(self) -> str:
        """The phase with the highest peak, but for the export."""
        return max((name for name in self.phases if name != "export"), key=self.phases.__getitem__)

    @property
    def peak_moment(self) -> str:
        """The phase of the peak, or the part of the training step: a key of `MOMENTS`."""
        if self.peak_phase != "train":
            return self.peak_phase
        return self.step_moment

    @property
    def step_moment(self) -> str:
        """The part of the training step in which it peaks."""
        parts = ("backward pass", "loss", "forward pass", "optimizer's step")
        return max(parts, key=self.step.__getitem__)

    @property
    def peak(self) -> int:
        """Tensors at the worst moment on the card."""
        return self.phases[self.peak_phase]

    @property
    def needed(self) -> int:
        """Peak and context together: what a card must have."""
        return self.peak + self.context

    def fits(self, gib: float) -> bool:
        """Whether a card of this size will do."""
        return self.needed <= gib * 2**30

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; see docs/plan.md."""
        return {
            **asdict(self),
            "peak": self.peak,
            "peak_phase": self.peak_phase,
            "peak_moment": self.peak_moment,
            "step_moment": self.step_moment,
            "needed": self.needed,
            "fits_gib": {str(card): self.fits(card) for card in CARDS_GIB},
        }
