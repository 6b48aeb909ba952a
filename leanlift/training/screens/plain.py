"""A run as lines of text: for logs, pipes and terminals that can do nothing else."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from leanlift.format import count, duration
from leanlift.training.screens.facts import Evaluation, FirstRow, Header, Refresh, Step, Summary
from leanlift.training.screens.words import (
    evaluation_line,
    first_row_lines,
    header_lines,
    refresh_line,
    row_note,
    step_line,
    summary_lines,
)

EVERY = 30.0
"""Seconds between two lines about the same long phase."""


class PlainScreen:
    """One line per event on `file`; nothing is ever written over.

    What others write to standard error stays there.

    Args:
        file: where the lines go; by default now's standard output.
        clock: seconds; of how long a phase takes.
    """

    takes_over = False

    def __init__(
        self, file: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.file = sys.stdout if file is None else file
        self.clock = clock
        self._phase = ""
        self._said = 0.0

    def open(self) -> None: ...

    @contextmanager
    def phase(self, what: str) -> Iterator[None]:
        self._print(f"{what} …")
        self._phase, self._said = what, self.clock()
        yield
        self._phase = ""

    def progress(
        self, what: str, done: float, total: float | None, seconds_left: float | None
    ) -> None:
        if self.clock() - self._said < EVERY:
            return
        self._said = self.clock()
        whole = f" of {count(total)}" if total else ""
        left = f", {duration(seconds_left)} left" if seconds_left is not None else ""
        self._print(f"{self._phase or what}: {count(done)}{whole}{left}")

    def first_row(self, row: FirstRow) -> None:
        for before, pieces in first_row_lines(row):
            self._print(before + "".join(text for text, _ in pieces))
        self._print(row_note(row, "in ⟦…⟧"))

    def header(self, header: Header) -> None:
        self._print("", *header_lines(header), "")
        self._said = self.clock()

    def step(self, step: Step) -> None:
        if step.loss is not None:
            self._print(step_line(step))
            self._said = self.clock()

    def refresh(self, refresh: Refresh) -> None:
        self._print(refresh_line(refresh))

    def evaluation(self, evaluation: Evaluation) -> None:
        self._print(evaluation_line(evaluation))
        self._said = self.clock()

    def stopping(self, text: str) -> None:
        with suppress(OSError):
            os.write(2, f"\n{text}\n".encode())

    def note(self, lines: Iterable[str]) -> None:
        self._print(*lines)

    def stopped(self, step: int, steps: int, checkpoint: str | None, command: str | None) -> None:
        """Said by the exception that ends the run."""

    def summary(self, summary: Summary) -> None:
        self._print("", *summary_lines(summary))

    def close(self) -> None: ...

    def _print(self, *lines: str) -> None:
        """Lines, with question marks for what the stream's encoding does not have."""
        encoding = getattr(self.file, "encoding", None) or "utf-8"
        for line in lines:
            known = line.rstrip().encode(encoding, "replace").decode(encoding)
            print(known, file=self.file)
        self.file.flush()
