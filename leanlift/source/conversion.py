"""transformers' own renaming and fusing of tensors while it loads, followed the other way.

A model that transformers has loaded knows which of its conversions were used. They are applied to
the names of the checkpoint as loading applies them; where several tensors become one, or one
several, the few operations on rows that there are (chunk, split, concatenate, stack) are applied to
the *places* of the rows instead of the rows. What another operation makes has no home: it cannot be
merged into the checkpoint row by row, and is refused as a target.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from leanlift.fingerprint import Home, Layout, Segment, overlaps
from leanlift.source.checkpoint import open_checkpoint
from leanlift.source.stored import plain_view

Shape = tuple[int, ...]


class _NoHomeError(Exception):
    """An operation that is none on rows."""


def layout_of(
    model: Any,
    disk: Mapping[str, Shape],
    live: Mapping[str, Shape],
    stacks: Mapping[str, Shape] | None = None,
    turned: Mapping[str, Shape] | None = None,
) -> Layout:
    """Where the tensors of a model lie in its checkpoint.

    Args:
        model: as transformers loaded it.
        disk: the shapes of the checkpoint's tensors; of a quantized matrix, that of the matrix.
        live: the shapes of the model's tensors, likewise.
        stacks: names and shapes [E, m, n] of those that are stacks of matrices. Of such a one the
            home is that of all rows [E * m, n], under its name and ".weight".
        turned: names and shapes [m, n] of matrices whose transpose a 16-bit checkpoint holds.

    Returns:
        What is not under its own name. A tensor that is in neither part of it, and whose name the
        checkpoint does not have, has no home.
    """
    from transformers.core_model_loading import dot_natural_key

    stacks, turned = stacks or {}, turned or {}
    live, (renamings, converters) = {**live, **stacks}, _conversions(model)
    names: dict[str, str] = {}
    groups: dict[str, _Group] = {}
    for name in sorted(disk, key=dot_natural_key):  # the order in which experts are stacked
        key, pattern = _renamed(name, model, renamings, converters, live)
        if pattern is None:
            if key in live and key != name:
                names[key] = name
        elif key in live:
            converter = next(c for c in converters if pattern in c.source_patterns)
            groups.setdefault(key, _Group(converter)).add(pattern, name, disk[name])
    homes: dict[str, Home] = {}
    for key, group in groups.items():
        homes |= {name: home for name, home in group.homes(key, live).items() if name in live}
    for stack in stacks:
        home = homes.pop(stack, None)
        if stack not in groups:
            home = _whole(names.get(stack, stack), live[stack], disk)
        elif home is None:
            home = groups[stack].turned(live[stack], disk)
        if home is not None:
            homes[f"{stack}.weight"] = home
    for key, (m, *_) in turned.items():
        disk_name = names.pop(key, key)
        if homes.pop(key, None) is None:  # what is made of several is not looked for among columns
            homes[key] = (Segment(disk_name, 0, m, turned=True),)
    return Layout(names, homes)


def _whole(name: str, shape: Shape, disk: Mapping[str, Shape]) -> Home | None:
    """All rows of a stack that is stored as it lives."""
    return (Segment(name, 0, shape[0] * shape[1]),) if disk.get(name) == shape else None


def layout_in(
    model: Any,
    directory: Path,
    live: Mapping[str, Shape],
    stacks: Mapping[str, Shape] | None = None,
    turned: Mapping[str, Shape] | None = None,
) -> Layout:
    """Where the tensors of a model lie in a checkpoint; headers alone are read.

    Args:
        model, live, stacks, turned: as in `layout_of`; the model may be one without contents.
        directory: of the checkpoint.
    """
    with open_checkpoint(directory) as files:
        disk = {key: tensor.shape for key, tensor in plain_view(files).items()}
    return layout_of(model, disk, live, stacks, turned)


def keys_while_loading(model: Any, names: Iterable[str], live: Mapping[str, Shape]) -> set[str]:
    """By which keys loading knows these tensors of a checkpoint, whether or not the model has a
    place for them.

    Args:
        model, live: as in `layout_of`.
        names: of tensors on disk.
    """
    renamings, converters = _conversions(model)
    return {_renamed(name, model, renamings, converters, live)[0] for name in names}


def _conversions(model: Any) -> tuple[list[Any], list[Any]]:
    """The renamings and the converters by which a model was loaded, but for those of quantization,
    which are no matter of names."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    used = getattr(model, "_weight_conversions", None)
    if used is None:
        used = get_model_conversion_mapping(model) if hasattr(model, "base_model_prefix") else []
    used = [deepcopy(conversion) for conversion in used]  # applying one is noted in it
    renamings = [one for one in used if isinstance(one, WeightRenaming)]
    converters = [
        one
        for one in used
        if isinstance(one, WeightConverter)
        and not any("bitsandbytes" in type(op).__module__ for op in one.operations)
    ]
    return renamings, converters


def _renamed(
    name: str, model: Any, renamings: list[Any], converters: list[Any], live: Mapping[str, Shape]
) -> tuple[str, str | None]:
    """The tensor of the model that one of the checkpoint becomes, or becomes a part of, and the
    pattern of the converter that does it."""
    from transformers.core_model_loading import rename_source_key

    prefix, known = getattr(model, "base_model_prefix", None), dict.fromkeys(live, True)
    key, pattern = rename_source_key(name, renamings, converters, prefix, known)
    if key not in live and name in live:
        key, pattern = rename_source_key(name, [], [], prefix, known)
    return key, pattern


def _count(home: Home) -> int:
    return sum(part.rows for part in home)


def _cut(home: Home, sizes: Sequence[int]) -> list[Home]:
    """Consecutive parts with so many rows each."""
    if sum(sizes) != _count(home) or min(sizes) < 1:
        raise _NoHomeError
    stops = list(accumulate(sizes))
    starts = [0, *stops[:-1]]
    return [
        tuple(part for part, _ in overlaps(home, start, stop))
        for start, stop in zip(starts, stops, strict=True)
    ]


@dataclass(frozen=True)
class _Rows:
    """The places of the rows of tensors, while they are converted.

    Attributes:
        homes: of several matrices.
        stacked: whether those are one tensor [E, m, n] by now.
    """

    homes: list[Home]
    stacked: bool = False


class _Group:
    """The tensors on disk that one converter takes together."""

    def __init__(self, converter: Any) -> None:
        self.converter = converter
        self.found: dict[str, list[Home]] = {}
        self.names: list[str] = []

    def add(self, pattern: str, name: str, shape: Shape) -> None:
        """A tensor on disk that matches one of the converter's patterns; only matrices have a home
        of rows."""
        home = (Segment(name, 0, shape[0]),) if len(shape) == 2 else ()
        self.names.append(name)
        self.found.setdefault(pattern, []).append(home)

    def turned(self, stack: Shape, disk: Mapping[str, Shape]) -> Home | None:
        """The home of a stack [E, m, n] whose matrices one tensor holds transposed; where the
        converter looks at shapes first, and they are the stack's, as they are."""
        operation, (parts, m, n) = self.converter.operations[0], stack
        alone = len(self.names) == len(self.converter.operations) == 1
        if not alone or type(operation).__name__ != "Transpose":
            return None
        if {operation.dim0, operation.dim1} != {1, 2}:
            return None
        if operation.check_dims and disk[self.names[0]] == stack:
            return _whole(self.names[0], stack, disk)
        fits = disk[self.names[0]] == (parts, n, m)
        return (Segment(self.names[0], 0, parts * m, turned=True),) if fits else None

    def homes(self, key: str, live: Mapping[str, Shape]) -> dict[str, Home]:
        """Homes of the matrices, or of the stack's rows, that come out; `key` is the first of
        them."""
        before, found, after = key.partition(self.converter.target_patterns[0])
        if not found or not all(home for many in self.found.values() for home in many):
            return {}
        full = {t: before + t + after for t in self.converter.target_patterns}
        try:
            out = {pattern: _Rows(homes) for pattern, homes in self.found.items()}
            for operation in self.converter.operations:
                out = self._after(operation, out, full, live)
        except _NoHomeError:
            return {}
        made = {full[target]: rows for target, rows in out.items() if target in full}
        return {
            name: tuple(segment for home in rows.homes for segment in home)
            for name, rows in made.items()
            if rows.stacked or len(rows.homes) == 1
        }

    def _after(
        self,
        operation: Any,
        given: dict[str, _Rows],
        full: dict[str, str],
        live: Mapping[str, Shape],
    ) -> dict[str, _Rows]:
        """What an operation on rows makes of the places of the rows.

        Raises:
            _NoHomeError: it is another operation.
        """
        kind, stacked = type(operation).__name__, [rows.stacked for rows in given.values()]
        if kind == "MergeModulelist" and operation.dim == 0 and not any(stacked):
            targets = self.converter.target_patterns
            names = targets if len(given) == len(targets) == 1 else given
            return {n: _Rows(r.homes, True) for n, r in zip(names, given.values(), strict=True)}
        row = 1 if all(stacked) else 0  # which dimension of the tensors is that of the rows
        if getattr(operation, "dim", None) != row or any(stacked) != all(stacked):
            raise _NoHomeError
        if getattr(operation, "num_shards_attribute", None) is not None:
            raise _NoHomeError
        if kind == "Concatenate" and len(self.converter.target_patterns) == 1:
            return {self.converter.target_patterns[0]: self._concatenated(given)}
        if kind not in ("Chunk", "Split") or len(given) != 1 or all(stacked):
            raise _NoHomeError
        (rows,) = given.values()
        return self._shared_out(kind, rows, full, live)

    def _concatenated(self, given: dict[str, _Rows]) -> _Rows:
        """The rows of tensors one after the other; of stacks, matrix by matrix."""
        parts = [given[s] for s in self.converter.source_patterns if s in given]
        if not parts[0].stacked:
            return _Rows([tuple(seg for rows in parts for home in rows.homes for seg in home)])
        if len({len(rows.homes) for rows in parts}) != 1:
            raise _NoHomeError
        together = zip(*(rows.homes for rows in parts), strict=True)
        return _Rows([tuple(seg for home in homes for seg in home) for homes in together], True)

    def _shared_out(
        self, kind: str, given: _Rows, full: dict[str, str], live: Mapping[str, Shape]
    ) -> dict[str, _Rows]:
        """The rows of one tensor, shared out among the targets."""
        (home,), targets = given.homes, self.converter.target_patterns
        if kind == "Split":
            if not all(name in live for name in full.values()):
                raise _NoHomeError
            sizes = [live[full[target]][0] for target in targets]
        else:  # as torch.chunk
            size = -(-_count(home) // len(targets))
            sizes = [min(size, _count(home) - i * size) for i in range(len(targets))]
        return {t: _Rows([part]) for t, part in zip(targets, _cut(home, sizes), strict=True)}
