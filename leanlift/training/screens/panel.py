"""A run as one live panel, with a line above it for every logged step.

rich draws; what is drawn is made of the words and pictures that the plain form has. The panel is
gone when the run ends, the lines stay.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from leanlift.format import bar, console, count, duration, loss, share, sparkline
from leanlift.training.screens.facts import Evaluation, FirstRow, Header, Refresh, Step, Summary
from leanlift.training.screens.words import (
    LABEL,
    evaluation_line,
    first_row_lines,
    header_lines,
    memory_words,
    rate,
    refresh_line,
    refresh_words,
    row_note,
    step_line,
    summary_lines,
)

WIDTH = 80
ECHO = 3
"""Columns that the panel leaves free: a terminal writes ^C behind it, and at its edge that would
begin a line that nobody takes away."""
BAR = 40
SOON = 1.0
"""Seconds after which a phase is shown."""
REDRAWN = 1 / 8
"""Seconds between two drawings."""
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


class PanelScreen:
    """Draws on a terminal.

    Args:
        file: the terminal; by default now's standard output.
        clock: seconds.
        forced: draw also on what is no terminal.
    """

    takes_over = True

    def __init__(
        self,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        forced: bool = False,
    ) -> None:
        file = sys.stdout if file is None else file
        self.console = _forced(file) if forced else console(file)
        self.clock = clock
        self._live: Live | None = None
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._phase: tuple[str, float] | None = None
        self._progress: tuple[str, float, float | None, float | None] | None = None
        self._step: Step | None = None
        self._logged: Step | None = None
        self._losses: list[float] = []
        self._refresh: Refresh | None = None
        self._stopping = ""

    def open(self) -> None:
        self._live = Live(
            console=self.console,
            get_renderable=self.view,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()
        self._ended = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)
        self._ticker.start()

    def _tick(self) -> None:
        """Draw again and again, but never between two parts of a line that is printed: rich's own
        thread would count the lines of another drawing than the one that is on the screen."""
        while not self._ended.wait(REDRAWN):
            with self._lock:
                if self._live is not None:
                    self._live.refresh()

    def close(self) -> None:
        if self._live is not None:
            self._ended.set()
            self._clear()
            with self._lock:
                self._live.stop()
                self._live = None
            self._ticker.join()

    @contextmanager
    def phase(self, what: str) -> Iterator[None]:
        begun = self.clock()
        self._phase, self._progress = (what, begun), None
        try:
            yield
        finally:
            self._phase = self._progress = None
        took = self.clock() - begun
        if took >= SOON:
            line = Text.assemble(("✓ ", "green"), what, (f"  {duration(took)}", "dim"))
            self._print(line)

    def progress(
        self, what: str, done: float, total: float | None, seconds_left: float | None
    ) -> None:
        self._progress = (what, done, total, seconds_left)

    def first_row(self, row: FirstRow) -> None:
        colour = self.console.color_system is not None
        lines: list[str | Text] = [""]
        for before, pieces in first_row_lines(row, marks=not colour):
            styled = [(text, "bold green" if trained else "") for text, trained in pieces]
            lines.append(Text.assemble((before, "bold"), *styled))
        marked = Text("in green", style="bold green") if colour else Text("in ⟦…⟧")
        self._print(*lines, Text(row_note(row, ""), style="dim").append_text(marked))

    def header(self, header: Header) -> None:
        self._print("", *map(_labelled, header_lines(header)), "")
        self._step = Step(header.begun, header.steps)

    def step(self, step: Step) -> None:
        self._step, self._progress = step, None
        if step.loss is not None:
            self._logged = step
            self._losses.append(step.loss)
            self._print(step_line(step))

    def refresh(self, refresh: Refresh) -> None:
        self._refresh, self._progress = refresh, None
        self._print(refresh_line(refresh), style="cyan")

    def evaluation(self, evaluation: Evaluation) -> None:
        self._progress = None
        self._print(evaluation_line(evaluation), style="magenta")

    def stopping(self, text: str) -> None:
        self._stopping = text

    def note(self, lines: Iterable[str]) -> None:
        self._print(*lines, style="yellow")

    def stopped(self, step: int, steps: int, checkpoint: str | None, command: str | None) -> None:
        self._clear()

    def summary(self, summary: Summary) -> None:
        self._clear()
        self._print("", *map(_labelled, summary_lines(summary)))

    def _clear(self) -> None:
        """Nothing is drawn any more."""
        self._phase = self._step = self._progress = None
        with self._lock:
            if self._live is not None:
                self._live.refresh()  # what is printed next is followed by what was drawn last

    def _print(self, *lines: str | Text, style: str = "") -> None:
        """Lines above what is drawn; a Text is not wrapped, so that it can be copied whole."""
        with self._lock:
            for line in lines:
                shown = Text(line, style=style) if isinstance(line, str) else line
                self.console.print(shown, soft_wrap=isinstance(line, Text))

    # --- the panel ---------------------------------------------------------------------------

    def view(self) -> Any:
        """What is drawn now: the panel, a phase, or nothing."""
        if self._step is not None:
            return self._panel(self._step)
        if self._phase is None:
            return Text("")
        what, begun = self._phase
        took = self.clock() - begun
        if took < SOON:
            return Text("")
        spin = SPINNER[int(took * 8) % len(SPINNER)]
        return Text(f"{spin} {what}  {self._how_far(duration(took))}", no_wrap=True)

    def _how_far(self, instead: str) -> str:
        """The progress of a phase as a bar with the time that is left."""
        if self._progress is None or not self._progress[2]:
            return instead
        _, done, total, left = self._progress
        assert total is not None
        drawn = f"{bar(done, total, 20):<20}"
        text = f"{drawn} {count(done)} of {count(total)}"
        return text + (f"  {duration(left)} left" if left is not None else "")

    def _panel(self, step: Step) -> Panel:
        logged, lines = self._logged, []
        left = f"{duration(step.seconds_left)} left" if step.seconds_left is not None else ""
        left = "" if step.step >= step.steps else left or "time left: –"
        drawn = f"{bar(step.step, step.steps, BAR):<{BAR}}"
        lines.append(
            Text.assemble(
                (drawn, "cyan"),
                f" {share(step.step, step.steps):>6}   ",
                (left, "bold"),
            )
        )
        if logged is not None and logged.loss is not None:
            lines.append(
                _fact("loss", f"{loss(logged.loss):<8}").append(
                    sparkline(self._losses), style="magenta"
                )
            )
            speed = logged.tokens_per_second
            shown = "–" if speed is None else f"{count(round(speed))} tokens/s"
            learning = "–" if logged.learning_rate is None else rate(logged.learning_rate)
            lines.append(_fact("speed", f"{shown}, learning rate {learning}"))
        lines.append(_fact("memory", memory_words(step.memory)))
        if self._refresh is not None:
            lines.append(_fact("refresh", refresh_words(self._refresh)))
        if self._progress is not None:
            lines.append(_fact(self._progress[0], self._how_far("")))
        if self._stopping:
            lines.append(Text(self._stopping, style="bold yellow"))
        for line in lines:
            line.no_wrap, line.overflow = True, "ellipsis"
        return Panel(
            Group(*lines),
            title=f"step {step.step:,} of {step.steps:,}",
            title_align="left",
            width=min(WIDTH, self.console.width) - ECHO,
            border_style="dim",
        )


def _fact(label: str, text: str) -> Text:
    return Text.assemble((f"{label:<{LABEL}}", "bold"), text)


def _labelled(line: str) -> Text:
    """A line whose first columns are a label."""
    return Text.assemble((line[:LABEL], "bold"), line[LABEL:])


def _forced(file: TextIO) -> Console:
    made = console(file)
    return Console(
        file=file,
        width=made.width,
        force_terminal=True,
        markup=False,
        highlight=False,
        emoji=False,
    )
