"""Names as a person knows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def short_name(model: str) -> str:
    """A model's hub name, or the last part of a path to it: a directory, or its config.json."""
    path = Path(model)
    if path.name == "config.json":
        path = path.parent
    is_path = path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1
    return (path.name if is_path else str(path)) or model


def name_of(choice: Any) -> str:
    """What an enum of transformers' says, or the name that was given."""
    return str(getattr(choice, "value", choice))
