"""Where the tensors of a live model lie in its checkpoint: under which names, in which rows.

transformers renames tensors while it loads, and makes some of several (or several of one): a
module's name is not always the checkpoint's. A `Layout` says for each tensor of the model that is
asked for which rows of which tensors on disk it is, in the order of its own rows. It is found once,
before anything is selected, and kept with the fingerprint; whatever goes from the model to the disk
(samples, merges) goes by it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from leanlift.io.bounded import is_module_name

MOST_SEGMENTS = 4096
"""Of one tensor, as read from an adapter of anyone's."""


@dataclass(frozen=True)
class Segment:
    """Rows `first:first + rows` of a tensor on disk; of its transpose where it is `turned`."""

    name: str
    first: int
    rows: int
    turned: bool = False


Home = tuple[Segment, ...]
"""Where the rows of a tensor of the model are, in their order."""


@dataclass(frozen=True)
class Layout:
    """Where tensors of a model lie that do not lie under their own names.

    Attributes:
        names: a model's tensor -> the one on disk that is all of it.
        homes: a model's matrix -> the rows of tensors on disk that it is made of.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    homes: Mapping[str, Home] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.names or self.homes)

    def is_turned(self, module: str) -> bool:
        """Whether a 16-bit checkpoint holds the transpose of a module's matrix."""
        return any(part.turned for part in self.homes.get(f"{module}.weight", ()))

    def of(self, names: Collection[str]) -> Layout:
        """What it says of these tensors alone."""
        return Layout(
            {name: disk for name, disk in self.names.items() if name in names},
            {name: home for name, home in self.homes.items() if name in names},
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON: by tensor of the model, a name or a list of [name, first row, rows], with `true`
        behind them where the tensor is turned."""
        rows = {
            name: [[part.name, part.first, part.rows, *[True] * part.turned] for part in home]
            for name, home in self.homes.items()
        }
        return {**self.names, **rows}

    @classmethod
    def from_dict(cls, data: Any) -> Layout:
        """Back from `to_dict`, from a file that anyone may have written.

        Raises:
            ValueError: it says something else; its text is what.
        """
        if not isinstance(data, dict) or not all(map(is_module_name, data)):
            raise ValueError("names of tensors")
        names = {name: disk for name, disk in data.items() if isinstance(disk, str)}
        if not all(map(is_module_name, names.values())):
            raise ValueError("names of tensors on disk")
        homes = {name: _home(home) for name, home in data.items() if name not in names}
        return cls(names, homes)


def _home(data: Any) -> Home:
    if not isinstance(data, list) or not 0 < len(data) <= MOST_SEGMENTS:
        raise ValueError("a list of rows of tensors")
    return tuple(map(_segment, data))


def _segment(data: Any) -> Segment:
    if not isinstance(data, list) or len(data) not in (3, 4) or not is_module_name(data[0]):
        raise ValueError("a name, a first row and a number of rows")
    name, first, rows, *turned = data
    if any(flag is not True for flag in turned):
        raise ValueError("true behind a number of rows, or nothing")
    if type(first) is not int or type(rows) is not int or first < 0 or rows < 1:
        raise ValueError("a first row and a number of rows")
    return Segment(name, first, rows, bool(turned))


def overlaps(home: Home, start: int, stop: int) -> Iterator[tuple[Segment, int]]:
    """Where rows `start:stop` of a matrix are, in order: parts of its segments, each with the
    matrix's row at which the part begins."""
    at = 0
    for part in home:
        low, high = max(start, at), min(stop, at + part.rows)
        if low < high:
            yield replace(part, first=part.first + low - at, rows=high - low), low
        at += part.rows
