"""By what a base and what it is asked are known again, so that results of others are not gone on
with: a directory's name says nothing of what is in it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from leanlift.errors import UserError
from leanlift.io.files import read_json
from leanlift.io.tensors import write_json

PLACES, PIECE = 64, 4096


def weights_mark(checkpoint: Path) -> str:
    """Of the config and the weights of a checkpoint: sizes of its files, and pieces of each."""
    digest = hashlib.sha256()
    for pattern in ("config.json", "*.safetensors", "*.bin"):
        for path in sorted(checkpoint.glob(pattern)):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for place in range(PLACES):
                    file.seek(size * place // PLACES)
                    digest.update(file.read(PIECE))
    return digest.hexdigest()[:16]


def mark_of(what: Any) -> str:
    """Of anything that is JSON-ready."""
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def check_same(place: Path, now: dict[str, str]) -> None:
    """Whether results are of these; where nothing is said of that yet, it is from now on.

    Args:
        place: of the note.
        now: in words, what is asked -> its mark.

    Raises:
        UserError: they are of others; says of which.
    """
    before = read_json(place) if place.is_file() else {}
    other = [what for what, mark in now.items() if before.get(what, mark) != mark]
    if other:
        raise UserError(
            f"{place.parent} has results of the same name by {' and '.join(other)} that differ "
            f"from what is given now: take {place.name} and what lies beside it under this name "
            "away, or give the directory or the file another name."
        )
    place.parent.mkdir(parents=True, exist_ok=True)
    write_json(place, now)
