"""What a run tells its screen: plain facts, without a word of how they look."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from leanlift.io.measured import KeptLoss


@dataclass(frozen=True)
class Header:
    """A run before its first step. Bytes, None where not known.

    Attributes:
        model: directory or hub name of the base.
        entries: trained entries.
        weights: weights of the model in all.
        matrices: how many have trained entries.
        rows, tokens: of the training data, as they are trained; None for a stream.
        longest: tokens of the longest row.
        steps: optimizer steps, `begun` of which a resumed run has taken.
        epochs: passes over the rows.
        batch: rows of a micro-batch.
        accumulate: micro-batches per step.
        planned: the planned peak, with CUDA's context on a card.
        room: what the card, or the machine, has.
        place: the card's name, or "RAM".
    """

    model: str
    entries: int
    weights: int
    matrices: int
    rows: int | None
    tokens: int | None
    longest: int | None
    steps: int
    begun: int
    epochs: float
    batch: int
    accumulate: int
    planned: int | None
    room: int | None
    place: str


@dataclass(frozen=True)
class FirstRow:
    """The first training row as the model sees it: text, and whether the loss is on it."""

    parts: tuple[tuple[str, bool], ...]
    tokens: int
    trained: int


@dataclass(frozen=True)
class Memory:
    """Bytes, None where this machine cannot tell.

    Attributes:
        now: of tensors on the card now (CUDA alone).
        peak: of tensors so far.
        planned: the planned peak of tensors.
        process: resident memory of the process now (CPU alone).
    """

    now: int | None = None
    peak: int | None = None
    planned: int | None = None
    process: int | None = None


@dataclass(frozen=True)
class Step:
    """A step that was taken.

    Attributes:
        step, steps: which one, of how many.
        epoch: passes over the rows so far.
        loss: mean since the last logged step; None in a step that is not logged.
        learning_rate: None in a step that is not logged.
        tokens_per_second: since the last logged step; None where it is not known.
        seconds_left: None before the first steps have been timed.
        memory: now.
    """

    step: int
    steps: int
    epoch: float | None = None
    loss: float | None = None
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    memory: Memory = Memory()


@dataclass(frozen=True)
class Refresh:
    """The trained entries were chosen again.

    Attributes:
        step: after which step.
        churn: share of the trained entries that changed.
        retired: entries that were trained once, let go, and keep their offset.
        held_back: newcomers that had no room.
        seconds: how long it took.
        following: step of the next refresh; None: there is none.
    """

    step: int
    churn: float
    retired: int
    held_back: int
    seconds: float
    following: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """The evaluation rows after a step (0: before the first): mean loss per trained token."""

    step: int
    loss: float
    seconds: float | None = None


@dataclass(frozen=True)
class Place:
    """What lies where: a word for it, its path, its bytes."""

    what: str
    path: str
    nbytes: int | None = None


@dataclass(frozen=True)
class Summary:
    """A run that has ended.

    Attributes:
        steps: that were taken, in all.
        begun: those that a resumed run had taken before.
        seconds: of training, in this process; `in_all` those of the whole run.
        tokens: trained on in this process.
        first_loss, last_loss: of the first and the last logged step.
        before, after: losses on evaluation rows; None: there are none.
        eval_rows: how many rows that are.
        kept: what became of the rows that were to be kept.
        memory: at the end.
        refreshes: how often the trained entries were chosen again.
        refresh_seconds: how long that took.
        churn: share of them that the last refresh changed.
        places: what lies where.
        commands: what to run next.
    """

    steps: int
    begun: int
    seconds: float
    in_all: float
    tokens: int | None
    first_loss: float | None
    last_loss: float | None
    before: float | None
    after: float | None
    eval_rows: int | None
    memory: Memory
    refreshes: int
    refresh_seconds: float
    churn: float | None
    places: tuple[Place, ...]
    commands: tuple[str, ...]
    kept: tuple[KeptLoss, ...] = ()


class Screen(Protocol):
    """What shows a run. A run calls these in the order in which they stand here; everything but
    `takes_over`, `open` and `close` is optional.

    Attributes:
        takes_over: whether whatever is written to standard output and error while the run goes on
            comes through `note` instead.
    """

    takes_over: bool

    def open(self) -> None:
        """The run begins."""

    def phase(self, what: str) -> AbstractContextManager[None]:
        """A part of the run that may take longer than a second."""

    def progress(
        self, what: str, done: float, total: float | None, seconds_left: float | None
    ) -> None:
        """How far something has come: a part of the present phase, or between two steps."""

    def first_row(self, row: FirstRow) -> None:
        """The first row, with what is trained of it."""

    def header(self, header: Header) -> None:
        """What is known when everything is loaded."""

    def step(self, step: Step) -> None:
        """After every step; those with a loss are logged ones."""

    def refresh(self, refresh: Refresh) -> None:
        """The mask has been refreshed."""

    def evaluation(self, evaluation: Evaluation) -> None:
        """The rows to evaluate on have been evaluated."""

    def stopping(self, text: str) -> None:
        """The user wants the run to stop. Called inside of a signal handler: it may not print
        through Python's buffers."""

    def note(self, lines: Iterable[str]) -> None:
        """Whole lines that a library or leanlift's log has written."""

    def stopped(self, step: int, steps: int, checkpoint: str | None, command: str | None) -> None:
        """The run has stopped early, as it was told to; the exception that ends it says so too."""

    def summary(self, summary: Summary) -> None:
        """The run has ended well."""

    def close(self) -> None:
        """The run has ended, also by an error; whatever was changed of the terminal is put back."""
