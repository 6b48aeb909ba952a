"""No screen at all: for runs from Python."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from leanlift.training.screens.facts import Evaluation, FirstRow, Header, Refresh, Step, Summary


class QuietScreen:
    """Shows nothing; warnings go where logging sends them."""

    takes_over = False

    def open(self) -> None: ...

    @contextmanager
    def phase(self, what: str) -> Iterator[None]:
        yield

    def progress(
        self, what: str, done: float, total: float | None, seconds_left: float | None
    ) -> None: ...

    def first_row(self, row: FirstRow) -> None: ...

    def header(self, header: Header) -> None: ...

    def step(self, step: Step) -> None: ...

    def refresh(self, refresh: Refresh) -> None: ...

    def evaluation(self, evaluation: Evaluation) -> None: ...

    def stopping(self, text: str) -> None: ...

    def note(self, lines: Iterable[str]) -> None: ...

    def stopped(
        self, step: int, steps: int, checkpoint: str | None, command: str | None
    ) -> None: ...

    def summary(self, summary: Summary) -> None: ...

    def close(self) -> None: ...
