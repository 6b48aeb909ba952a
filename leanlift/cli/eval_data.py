"""What `leanlift eval --data` names: a file or a dataset, and what it is called in the table.

`prose=b.txt` gives a name; without one it is the file's own. A path with a `=` in it is a path
where such a file exists, or where a `/` comes before it: no name has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path

from leanlift.errors import UserError

LONGEST = 40
"""Characters of a name."""


@dataclass(frozen=True)
class Data:
    """A dataset to measure on: what it is called, and its path or hub name."""

    name: str
    path: str

    def where(self, several: bool) -> str:
        """How messages about its rows call it: one alone is the eval dataset."""
        return f"eval ({self.path})" if several else "eval"


def read_data(given: Sequence[str]) -> tuple[Data, ...]:
    """Each of the texts of `--data`.

    Raises:
        UserError: a name that is none, or that two have.
    """
    found = tuple(map(_one, given))
    for number, data in enumerate(found):
        other = next((each for each in found[:number] if each.name == data.name), None)
        if other is not None:
            raise UserError(
                f"--data {other.path} and --data {data.path} are both called {data.name!r}: give "
                "them names of their own, as in --data NAME=FILE."
            )
    return found


def _one(given: str) -> Data:
    name, sign, path = given.partition("=")
    whole = Path(expanduser(given))
    if not sign or "/" in name or whole.is_file():
        return Data(_printable(whole.stem if whole.suffix else whole.name), expanduser(given))
    if not name.strip() or not path:
        raise UserError(f"--data {given!r} is no NAME=FILE: expected both, or a file alone.")
    if len(name) > LONGEST or not name.isprintable():
        raise UserError(
            f"a name of --data is a line of at most {LONGEST} characters: {name!r:.60}."
        )
    return Data(name, expanduser(path))


def _printable(name: str) -> str:
    """A file's own name as a table can show it."""
    return "".join(c if c.isprintable() else "?" for c in name)[:LONGEST]
