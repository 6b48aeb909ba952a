"""A run as JSON lines: one object per event, for programs. The keys are in `docs/screens.md`."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TextIO

from leanlift.training.screens.facts import Evaluation, FirstRow, Header, Refresh, Step, Summary

EVERY = 1.0
"""Seconds between two events about the same phase."""


class JsonScreen:
    """Every line on `file` is a JSON object with `event` and `seconds` since the run began; numbers
    are exact, what is not known is null.

    Args:
        file: where the lines go; by default now's standard output.
        clock: seconds.
    """

    takes_over = True

    def __init__(
        self, file: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.file = sys.stdout if file is None else file
        self.clock = clock
        self._begun = clock()
        self._phase: str | None = None
        self._said = -math.inf
        self._pending: list[str] = []

    def open(self) -> None:
        self._begun = self.clock()

    @contextmanager
    def phase(self, what: str) -> Iterator[None]:
        begun = self.clock()
        self._phase, self._said = what, begun
        self._write("phase", what=what, state="begun", took=None)
        yield
        self._phase = None
        self._write("phase", what=what, state="done", took=round(self.clock() - begun, 3))

    def progress(
        self, what: str, done: float, total: float | None, seconds_left: float | None
    ) -> None:
        if self.clock() - self._said >= EVERY:
            self._said = self.clock()
            what = self._phase or what
            self._write("progress", what=what, done=done, total=total, seconds_left=seconds_left)

    def first_row(self, row: FirstRow) -> None:
        parts = [{"text": text, "trained": trained} for text, trained in row.parts]
        self._write("first_row", parts=parts, tokens=row.tokens, trained=row.trained)

    def header(self, header: Header) -> None:
        self._write("header", **asdict(header))

    def step(self, step: Step) -> None:
        if step.loss is not None:
            self._write("step", **asdict(step))

    def refresh(self, refresh: Refresh) -> None:
        took = refresh.seconds
        facts = {key: value for key, value in asdict(refresh).items() if key != "seconds"}
        self._write("refresh", **facts, took=took)

    def evaluation(self, evaluation: Evaluation) -> None:
        facts = asdict(evaluation)
        self._write("evaluation", took=facts.pop("seconds"), **facts)

    def stopping(self, text: str) -> None:
        self._pending.append(text)

    def note(self, lines: Iterable[str]) -> None:
        for line in lines:
            if line.strip():
                self._write("note", text=line)

    def stopped(self, step: int, steps: int, checkpoint: str | None, command: str | None) -> None:
        self._write("stopped", step=step, steps=steps, checkpoint=checkpoint, command=command)

    def summary(self, summary: Summary) -> None:
        facts = asdict(summary)
        self._write("summary", took=facts.pop("seconds"), **facts)

    def close(self) -> None:
        self._flush()

    def _flush(self) -> None:
        while self._pending:
            self._put("note", {"text": self._pending.pop(0)})

    def _write(self, event: str, **facts: Any) -> None:
        self._flush()
        self._put(event, facts)

    def _put(self, event: str, facts: dict[str, Any]) -> None:
        seconds = round(self.clock() - self._begun, 3)
        line = {"event": event, "seconds": seconds, **_plain(facts)}
        print(json.dumps(line, allow_nan=False), file=self.file, flush=True)


def _plain(value: Any) -> Any:
    """Without NaN and infinities, which JSON has not: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(held) for held in value]
    return value
