"""One line on a terminal that says what is being tried, and is gone when it is done."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from leanlift.errors import UserError, first_line


class Trying:
    """Call it with what is being tried. Where standard error is no terminal it says nothing: what
    came of it is said later."""

    def __init__(self) -> None:
        self._shown = 0

    def __enter__(self) -> Trying:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self("")

    def __call__(self, line: str) -> None:
        if not sys.stderr.isatty():
            return
        line = line[:78]
        print(f"\r{line.ljust(self._shown)}\r{line}", end="", file=sys.stderr, flush=True)
        self._shown = len(line)


@contextmanager
def planning(model: str) -> Iterator[Trying]:
    """Plans are made inside, and what is tried is said.

    Raises:
        UserError: in the place of whatever a model's own code does under fake tensors.
    """
    try:
        with Trying() as trying:
            yield trying
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the model {model} cannot be planned for: {first_line(error)}") from error
