"""transformers' own renaming and fusing of tensors while it loads, followed the other way.

A model that transformers has loaded knows which of its conversions were used. They are applied to
the names of the checkpoint as loading applies them; where several tensors become one, or one
several, the few operations on rows that there are (chunk, split, concatenate) are applied to
the *places* of the rows instead of the rows. What another operation makes has no home: it cannot
be merged into the checkpoint row by row, and is refused as a target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import accumulate
from pathlib import Path
from typing import Any

from leanlift.fingerprint import Home, Layout, Segment, overlaps
from leanlift.source.checkpoint import open_checkpoint
from leanlift.source.stored import plain_view

Shape = tuple[int, ...]


class _NoHomeError(Exception):
    """An operation that is none on rows."""


def layout_of(model: Any, disk: Mapping[str, Shape], live: Mapping[str, Shape]) -> Layout:
    """Where the tensors of a model lie in its checkpoint.

    Args:
        model: as transformers loaded it.
        disk: the shapes of the checkpoint's tensors; of a quantized matrix, that of the matrix.
        live: the shapes of the model's tensors, likewise.

    Returns:
        What is not under its own name. A tensor that is in neither part of it, and whose name the
        checkpoint does not have, has no home.
    """
    renamings, converters = _conversions(model)
    names: dict[str, str] = {}
    groups: dict[str, _Group] = {}
    for name in sorted(disk):
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
    return Layout(names, homes)


def layout_in(model: Any, directory: Path, live: Mapping[str, Shape]) -> Layout:
    """Where the tensors of a model lie in a checkpoint; headers alone are read.

    Args:
        model, live: as in `layout_of`; the model may be one without contents.
        directory: of the checkpoint.
    """
    with open_checkpoint(directory) as files:
        disk = {key: tensor.shape for key, tensor in plain_view(files).items()}
    return layout_of(model, disk, live)


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


class _Group:
    """The tensors on disk that one converter takes together."""

    def __init__(self, converter: Any) -> None:
        self.converter = converter
        self.found: dict[str, list[Home]] = {}

    def add(self, pattern: str, name: str, shape: Shape) -> None:
        """A tensor on disk that matches one of the converter's patterns; only matrices have a home
        of rows."""
        home = (Segment(name, 0, shape[0]),) if len(shape) == 2 else ()
        self.found.setdefault(pattern, []).append(home)

    def homes(self, key: str, live: Mapping[str, Shape]) -> dict[str, Home]:
        """Homes of the matrices of the model that come out; `key` is the first of them."""
        before, found, after = key.partition(self.converter.target_patterns[0])
        if not found or not all(home for many in self.found.values() for home in many):
            return {}
        full = {t: before + t + after for t in self.converter.target_patterns}
        try:
            out = self.found
            for operation in self.converter.operations:
                out = self._after(operation, out, full, live)
        except _NoHomeError:
            return {}
        return {full[target]: home for target, (home,) in out.items() if target in full}

    def _after(
        self,
        operation: Any,
        given: dict[str, list[Home]],
        full: dict[str, str],
        live: Mapping[str, Shape],
    ) -> dict[str, list[Home]]:
        """What an operation on rows makes of the places of the rows.

        Raises:
            _NoHomeError: it is another operation.
        """
        kind, targets = type(operation).__name__, self.converter.target_patterns
        if getattr(operation, "dim", None) != 0:
            raise _NoHomeError
        if getattr(operation, "num_shards_attribute", None) is not None:
            raise _NoHomeError
        if kind == "Concatenate" and len(targets) == 1:
            parts = [home for s in self.converter.source_patterns for home in given.get(s, [])]
            return {targets[0]: [tuple(segment for home in parts for segment in home)]}
        if kind not in ("Chunk", "Split") or len(given) != 1:
            raise _NoHomeError
        ((home,),) = given.values()
        if kind == "Split":
            if not all(name in live for name in full.values()):
                raise _NoHomeError
            sizes = [live[full[target]][0] for target in targets]
        else:  # as torch.chunk
            size = -(-_count(home) // len(targets))
            sizes = [min(size, _count(home) - i * size) for i in range(len(targets))]
        return {t: [part] for t, part in zip(targets, _cut(home, sizes), strict=True)}
