"""Whether a checkpoint's config.json is of a language model that leanlift can train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from leanlift.errors import UserError
from leanlift.io.bounded import MOST_OF_A_STRANGER
from leanlift.io.files import read_json
from leanlift.io.kinds import (
    CAUSAL,
    auto_class_name,
    classes_of,
    has_encoder,
    is_known,
    no_language_model,
    with_encoder,
)


def check_kind(directory: Path, name: str, trusted: bool) -> None:
    """Refuse a base of a kind that is known and has no language model in it.

    Args:
        directory: of the checkpoint.
        name: of the base, for messages.
        trusted: whether code that comes with a checkpoint may say what it is.

    Raises:
        UserError: it is one, or its config.json cannot be read.
    """
    config: Any = read_json(directory / "config.json", MOST_OF_A_STRANGER)
    if not isinstance(config, dict):
        raise UserError(f"{directory / 'config.json'} is no configuration: expected an object.")
    kind = config.get("model_type")
    if trusted or "auto_map" in config or not isinstance(kind, str) or not classes_of(CAUSAL):
        return
    if has_encoder(config):
        raise UserError(with_encoder(name, kind))
    if is_known(kind) and auto_class_name(config) is None:
        raise UserError(no_language_model(name, kind))
