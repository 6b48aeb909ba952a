"""While a run is shown, nothing else draws: bars of libraries are folded into the screen, and what
is written to standard output and error goes through it in whole lines.

Every bar in these libraries (datasets, transformers, the hub, ours) is a tqdm, so one place is
enough: what a bar would draw becomes `progress`. Everything is put back when the run ends.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TextIO

from tqdm import std
from transformers import PrinterCallback, ProgressCallback

from leanlift.training.callbacks import Refresh
from leanlift.training.screens.facts import Screen


@contextmanager
def shown(screen: Screen) -> Iterator[None]:
    """A run on its screen: opened, in the place of bars and streams, and closed."""
    with ExitStack() as stack:
        stack.enter_context(folded_bars(screen.progress))
        if screen.takes_over:
            stack.enter_context(whole_lines(screen.note))
        stack.callback(screen.close)
        screen.open()
        yield


def silence(trainer: Any) -> None:
    """Take away what HF Trainer shows by itself, and let refreshes say how far they are."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, Refresh):
            callback.progress = True


@contextmanager
def folded_bars(
    progress: Callable[[str, float, float | None, float | None], None],
) -> Iterator[None]:
    """Within it a tqdm draws nothing; how far it has come is given to `progress`."""
    kept = {name: vars(std.tqdm)[name] for name in ("__init__", "display")}
    made = std.tqdm.__init__

    def make(self: Any, *args: Any, **options: Any) -> None:
        if len(args) < 5:  # file is the fifth
            options["file"] = io.StringIO()
            if options.get("disable") is None and "disable" in options:
                options["disable"] = False  # None: where the file is no terminal, which it is not
        made(self, *args, **options)

    def display(self: Any, msg: str | None = None, pos: int | None = None) -> bool:
        if msg is None:
            facts = self.format_dict
            done, total, speed = facts["n"], facts["total"], facts["rate"]
            if not speed and facts["elapsed"]:
                speed = (done - facts["initial"]) / facts["elapsed"]
            left = (total - done) / speed if total and speed else None
            progress(str(self.desc or "").rstrip(": "), done, total, left)
        return True

    std.tqdm.__init__, std.tqdm.display = make, display
    try:
        yield
    finally:
        for name, held in kept.items():
            setattr(std.tqdm, name, held)


@contextmanager
def whole_lines(note: Callable[[Iterable[str]], None]) -> Iterator[None]:
    """Within it what this process writes to standard output and error, also through log handlers
    that were made before, comes to `note` in whole lines."""
    streams = (sys.stdout, sys.stderr)
    lines = [_Lines(stream, note) for stream in streams]
    places = {id(sys.__stdout__): lines[0], id(sys.__stderr__): lines[1]}
    places |= {id(stream): line for stream, line in zip(streams, lines, strict=True)}
    moved = [
        (handler, handler.setStream(places[id(handler.stream)]))
        for handler in _handlers()
        if id(handler.stream) in places
    ]
    sys.stdout, sys.stderr = lines
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        for handler, stream in moved:
            handler.setStream(stream)
        for line in lines:
            line.end()


def _handlers() -> list[logging.StreamHandler[Any]]:
    """Every handler of every logger that holds a stream; a file is none, and one that asks for
    sys.stderr each time holds none."""
    known = [logging.root, *logging.root.manager.loggerDict.values()]
    found = {
        id(handler): handler
        for logger in known
        if isinstance(logger, logging.Logger)
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler)
        and not isinstance(handler, logging.FileHandler)
        and "stream" in vars(handler)
    }
    return list(found.values())


class _Lines(io.TextIOBase):
    """A stream whose whole lines go elsewhere; in a child process, to the real stream.

    Args:
        stream: what it stands for.
        note: takes the lines.
    """

    def __init__(self, stream: TextIO, note: Callable[[Iterable[str]], None]) -> None:
        self.stream, self.note = stream, note
        self._process = os.getpid()
        self._rest = ""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        return self.stream.fileno()

    def write(self, text: str) -> int:
        if os.getpid() != self._process:  # a child must not wait for the screen's lock
            return self.stream.write(text)
        *whole, self._rest = (self._rest + text).split("\n")
        lines = [line.rsplit("\r", 1)[-1] for line in whole]
        lines = [line for line in lines if line.strip()]
        if lines:
            self.note(lines)
        return len(text)

    def flush(self) -> None: ...

    def end(self) -> None:
        """What stands on the last line without an end goes to the real stream."""
        if self._rest.strip():
            self.stream.write(self._rest + "\n")
        self._rest = ""
