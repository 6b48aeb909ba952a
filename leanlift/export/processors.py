"""The files that say how images and sound become what a model takes.

They go with the adapter and with the merge, all of them from one source: the adapter's where it has
some, being what was trained with, else the base's. As a tokenizer's may, they may name code that
comes with a checkpoint; what is named is the base's, never the adapter's.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from leanlift.errors import UserError
from leanlift.io.hub import inside
from leanlift.io.tensors import read_json, replacing, write_json

FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
LARGEST = 4 * 2**20
"""Bytes of one of them; they have a few thousand."""


def keep_processor(base: Path | None, adapter: Path) -> None:
    """Put the processor's files of a base, if it is at hand and has some, beside an adapter."""
    for name in FILES if base is not None and not has_processor(adapter) else ():
        assert base is not None
        if (base / name).is_file():
            with replacing(adapter / name) as temporary:
                shutil.copyfile(base / name, temporary)


def write_processor(base: Path, adapter: Path, output: Path) -> None:
    """Write the processor's files of a merge.

    Args:
        base: the base checkpoint, whose small files are in `output` already.
        adapter: the adapter's directory.
        output: where the merge is.

    Raises:
        UserError: a file is damaged, or a link to elsewhere.
    """
    if not has_processor(adapter):
        return
    for name in FILES:
        (output / name).unlink(missing_ok=True)
        if (adapter / name).is_file():
            named = _object(base, name) if (base / name).is_file() else {}
            write_json(output / name, _with_code_of(named, _object(adapter, name)))


def has_processor(directory: Path) -> bool:
    """Whether a directory has files of a processor."""
    return any((directory / name).is_file() for name in FILES)


def _with_code_of(base: Any, own: Any) -> Any:
    """A configuration whose code is the base's, all the way down."""
    if not isinstance(own, dict):
        return own
    base = base if isinstance(base, dict) else {}
    made = {key: _with_code_of(base.get(key), value) for key, value in own.items()
            if key != "auto_map"}  # fmt: skip
    return {**made, **({"auto_map": base["auto_map"]} if "auto_map" in base else {})}


def _object(directory: Path, name: str) -> dict[str, Any]:
    target = inside(directory, directory / name)
    if target is None:
        raise UserError(
            f"{directory / name} is a link to {(directory / name).resolve()}, outside of its "
            "directory: remove it."
        )
    data = read_json(target, LARGEST)
    if not isinstance(data, dict):
        raise UserError(f"{directory / name} is damaged: expected a JSON object.")
    return data
