"""leanlift, by `leanlift train`'s own path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.quality.paper.cost import Shapes, selection
from benchmarks.quality.paper.pace import Pace
from benchmarks.quality.paper.task import FORMATS, Facts, Task, load_base, peaks
from leanlift import load_adapter
from leanlift.training import LiftSFTConfig, RunArguments, last_whole_checkpoint, run
from leanlift.training.screens import QuietScreen, Step, Summary


@dataclass(frozen=True)
class Lift:
    """leanlift.

    Attributes:
        kind: see `Method`.
        mask: settings of RunArguments that differ from the suite's.
        loop: fields of LiftSFTConfig that do.
    """

    kind: str
    mask: Mapping[str, Any] = field(default_factory=dict)
    loop: Mapping[str, Any] = field(default_factory=dict)

    def _mask(self, task: Task) -> dict[str, Any]:
        return {**task.mask, **self.mask}

    def settings(self, task: Task) -> dict[str, Any]:
        return {"kind": self.kind, **self._mask(task), **task.settings(self.loop)}

    def train(self, task: Task) -> Facts:
        args = RunArguments(
            task.model, str(task.data), **{**self._mask(task), **FORMATS[self.kind]}
        )
        resume = "true" if last_whole_checkpoint(task.run) else None
        given: dict[str, Any] = {"output_dir": str(task.run), "resume_from_checkpoint": resume}
        shown = _Shown(task.pace())
        result = run(args, LiftSFTConfig(**given, **task.settings(self.loop)), screen=shown)
        assert shown.ended is not None
        return {
            **shown.pace.facts(),
            **peaks(result.memory),
            "trained": result.memory.entries,
            "refreshes": shown.ended.refreshes,
            "refresh_seconds": round(shown.ended.refresh_seconds, 1),
        }

    def load(self, task: Task) -> Any:
        return load_adapter(load_base(task.model, self.kind), task.run)

    def operations(self, task: Task, shapes: Shapes) -> int:
        mask, rows = self._mask(task), task.rows
        targets = shapes.of_targets(mask.get("target_modules"))
        total = shapes.passes(rows, task.settings(self.loop).get("gradient_checkpointing", True))
        total += 2 * rows.tokens * sum(m * n for m, n in targets)
        if mask.get("selector", "principal") == "principal":
            interval = mask.get("refresh_interval", 0)
            times = 1 + ((rows.steps - 1) // interval if interval else 0)
            total += times * selection(targets, mask["approx_rank"])
        return total

    def needs(self, shapes: Shapes) -> int:
        return 0


class _Shown(QuietScreen):
    """Hears of a run's steps, and of its end."""

    def __init__(self, pace: Pace) -> None:
        self.pace, self.ended = pace, None

    ended: Summary | None

    def step(self, step: Step) -> None:
        self.pace.at(step.step, step.steps)

    def summary(self, summary: Summary) -> None:
        self.ended = summary
