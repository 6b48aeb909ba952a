"""One training, and what a method has to be able to do with it.

What is trained lies in `<output>/run`. A run that was stopped goes on from the last checkpoint
there that is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.quality.paper.cost import Rows, Shapes
from benchmarks.quality.paper.pace import Pace
from leanlift.measure import MemoryReport
from leanlift.training import RunArguments
from leanlift.training.base import load_model

FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "int8": {"load_in_4bit": False, "load_in_8bit": True},
    "16bit": {"load_in_4bit": False},
}
"""How a base is held -> settings of a run."""

CHECKPOINTS = 10
"""That a run writes on its way."""

Facts = dict[str, Any]


def device() -> torch.device:
    """What is trained on."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def load_base(model: str, kind: str) -> Any:
    """A base as it is held, without an adapter."""
    return load_model(RunArguments(model, **FORMATS[kind]), device())


@dataclass(frozen=True)
class Task:
    """One training.

    Attributes:
        model: directory of the base.
        data: file of the training rows.
        output: where everything about this method goes.
        mask: the suite's settings of RunArguments.
        loop: the suite's fields of LiftSFTConfig.
        asked: those that the user has given, before all others.
        rows: what the run goes through.
        say: is told of the progress.
    """

    model: str
    data: Path
    output: Path
    mask: Mapping[str, Any]
    loop: Mapping[str, Any]
    asked: Mapping[str, Any]
    rows: Rows
    say: Callable[[str], None]

    @property
    def run(self) -> Path:
        """Where the run writes to."""
        return self.output / "run"

    def settings(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of LiftSFTConfig, with a method's own."""
        saved = max(1, self.rows.steps // CHECKPOINTS)
        return {
            "save_strategy": "steps", "save_steps": saved, "save_total_limit": 1,
            "use_cpu": device().type == "cpu", "disable_tqdm": True,
            **self.loop, **own, **self.asked,
        }  # fmt: skip

    def pace(self) -> Pace:
        """Of a run that begins, or goes on, now."""
        saved = self.settings({})["save_steps"]
        return Pace(saved, self.rows.tokens / self.rows.steps, self.say)


class Method(Protocol):
    """One row of the table.

    Attributes:
        kind: how the base is held, one of `FORMATS`.
    """

    @property
    def kind(self) -> str: ...

    def settings(self, task: Task) -> dict[str, Any]:
        """All that decides what comes out, JSON-ready."""

    def train(self, task: Task) -> Facts:
        """Train to the end; `task.run` holds the result. What was measured on the way."""

    def load(self, task: Task) -> Any:
        """The trained model, on the device."""

    def operations(self, task: Task, shapes: Shapes) -> int:
        """Floating-point operations of the whole training."""

    def needs(self, shapes: Shapes) -> int:
        """Bytes of memory without which it is not worth a try; 0: not known."""


def peaks(report: MemoryReport) -> Facts:
    """Bytes at the peak: what the process took of the device (reserved on CUDA, resident on a CPU)
    in all phases, and tensors while it trained."""
    taken = [phase.reserved or phase.resident or 0 for phase in report.phases.values()]
    return {"peak_bytes": max(taken), "peak_tensors": report.phases["train"].tensors}
