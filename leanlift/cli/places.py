"""Places that a command shall write to, looked at before anything slow."""

from __future__ import annotations

import os
from pathlib import Path

from leanlift.errors import UserError


def new_settings_file(given: str) -> Path:
    """A place for a file of settings.

    Raises:
        UserError: there is something already, no directory for it or one that may not be written,
            or another kind of file is named.
    """
    path = Path(given).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"expected a name such as run.yaml for the settings, got {given!r}.")
    if path.exists():
        raise UserError(f"{path} exists already: name another file, or remove it.")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise UserError(f"there is no directory {parent} for {path.name}: make it first.")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{path} cannot be written: name another place.")
    return path
