"""Opening an adapter directory, whichever form it has."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from leanlift.adapters.native import read_native
from leanlift.adapters.offsets import Adapter
from leanlift.adapters.peft import FORM_OF_TYPE, read_peft
from leanlift.errors import UserError
from leanlift.fingerprint import BaseFingerprint
from leanlift.io.bounded import MOST_OF_A_STRANGER
from leanlift.io.hub import local_copy, snapshot_of
from leanlift.io.places import (
    ADAPTER_WRITERS,
    CONFIG_NAME,
    FACTS_NAME,
    OWN_TYPE,
    RUN_NAME,
    WEIGHTS_NAME,
    adapter_type,
    look_at,
)
from leanlift.io.tensors import open_tensor_file, read_json
from leanlift.source import stored_base

FILES = (CONFIG_NAME, WEIGHTS_NAME, FACTS_NAME, RUN_NAME, "memory.json", "tokenizer*", "*.jinja")
"""What is wanted of an adapter on the hub."""

COMMIT = re.compile(r"[0-9a-f]{40}")
LONGEST_NAME = 4096
"""Of a base that a stranger names."""


@contextmanager
def open_adapter(
    source: str | Path,
    live_base: Callable[[list[str]], BaseFingerprint] | None = None,
    base: str | Path | None = None,
) -> Iterator[Adapter]:
    """Open an adapter in any form.

    An adapter that PEFT itself has trained does not say what its base is: a live model says it, or
    a checkpoint on this machine.

    Args:
        source: a directory, or a hub name.
        live_base: the fingerprint of a live model for the named modules.
        base: the checkpoint; default: the one that the adapter names.

    Raises:
        UserError: not an adapter, one of a newer format, damaged, or of a base that is not at hand.
    """
    if Path(source).is_file():
        raise UserError(
            f"{source} is no leanlift adapter but {look_at(source).words}: expected a directory "
            "written by save_adapter or a training run."
        )
    directory = local_copy(source, FILES, "the adapter", ADAPTER_WRITERS)
    if not (directory / CONFIG_NAME).is_file():
        raise UserError(
            f"{directory} is no leanlift adapter but {look_at(directory).words}: expected a "
            "directory written by save_adapter or a training run."
        )
    data = read_json(directory / CONFIG_NAME, MOST_OF_A_STRANGER)
    kind = adapter_type(data)
    form = FORM_OF_TYPE.get(kind) if isinstance(kind, str) else None
    if kind != OWN_TYPE and form is None:
        raise UserError(
            f"{directory / CONFIG_NAME} was not written by leanlift (peft_type {kind!r:.80}), and "
            "leanlift reads no other adapters than its own and PEFT's "
            f"{' and '.join(form.words for form in FORM_OF_TYPE.values())}."
        )
    with open_tensor_file(directory / WEIGHTS_NAME) as tensors:
        if form is None:
            yield read_native(directory, data, tensors)
        else:
            ask = live_base or _StoredBase(directory, data, base)
            yield read_peft(form, directory, data, tensors, ask)


class _StoredBase:
    """Asks the checkpoint that an adapter of PEFT's was trained over what it is.

    Args:
        directory: of the adapter.
        data: its adapter_config.json.
        base: the checkpoint, where it is not the one named there.
    """

    def __init__(self, directory: Path, data: dict[str, Any], base: str | Path | None) -> None:
        self.directory = directory
        named, revision = data.get("base_model_name_or_path"), data.get("revision")
        if not isinstance(named, str) or len(named) > LONGEST_NAME or not named.isprintable():
            named = ""
        self.name = named if base is None else str(base)
        known = base is None and isinstance(revision, str) and COMMIT.fullmatch(revision)
        self.revision = revision if known else None

    def __call__(self, modules: list[str]) -> BaseFingerprint:
        """Its fingerprint for these modules.

        Raises:
            UserError: it is not on this machine: nothing is fetched for a stranger's word.
        """
        name = self.name
        place = snapshot_of(name, self.revision) if name else None
        if place is None or not (place / "config.json").is_file():
            shown = f"{name}, which is not on this machine" if name else "no base"
            raise UserError(
                f"{self.directory} was trained by PEFT and names {shown}, and nothing else says "
                "what exactly its base is: name the base's directory (where a command takes one), "
                "or load it into the base with load_adapter(model, ...), then save_adapter."
            )
        is_hub = not Path(name).expanduser().is_dir()
        commit = place.name if is_hub and COMMIT.fullmatch(place.name) else None
        return stored_base(place, name, modules, commit)
