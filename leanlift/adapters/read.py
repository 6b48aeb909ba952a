"""Opening an adapter directory, whichever form it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from leanlift.adapters.native import read_native
from leanlift.adapters.offsets import Adapter
from leanlift.adapters.shira import read_shira
from leanlift.errors import UserError
from leanlift.fingerprint import BaseFingerprint
from leanlift.io.bounded import MOST_OF_A_STRANGER
from leanlift.io.hub import local_copy
from leanlift.io.places import (
    CONFIG_NAME,
    FACTS_NAME,
    OWN_TYPE,
    PEFT_TYPE,
    RUN_NAME,
    WEIGHTS_NAME,
    adapter_type,
    look_at,
)
from leanlift.io.tensors import open_tensor_file, read_json

FILES = (CONFIG_NAME, WEIGHTS_NAME, FACTS_NAME, RUN_NAME, "memory.json", "tokenizer*", "*.jinja")
"""What is wanted of an adapter on the hub."""


@contextmanager
def open_adapter(
    source: str | Path, live_base: Callable[[list[str]], BaseFingerprint] | None = None
) -> Iterator[Adapter]:
    """Open an adapter in either form.

    Args:
        source: a directory, or a hub name.
        live_base: the fingerprint of a live model for the named modules; only with it can an
            adapter that PEFT itself has trained be read.

    Raises:
        UserError: not an adapter, one of a newer format, or damaged.
    """
    if Path(source).is_file():
        raise UserError(
            f"{source} is no leanlift adapter but {look_at(source).words}: expected a directory "
            "written by save_adapter or a training run."
        )
    directory = local_copy(
        source,
        FILES,
        "the adapter",
        "expected what save_adapter, a training run or leanlift export --format peft has written",
    )
    if not (directory / CONFIG_NAME).is_file():
        raise UserError(
            f"{directory} is no leanlift adapter but {look_at(directory).words}: expected a "
            "directory written by save_adapter or a training run."
        )
    data = read_json(directory / CONFIG_NAME, MOST_OF_A_STRANGER)
    kind = adapter_type(data)
    if kind not in (OWN_TYPE, PEFT_TYPE):
        raise UserError(
            f"{directory / CONFIG_NAME} was not written by leanlift (peft_type {kind!r:.80}), and "
            "leanlift reads no other adapters than its own and PEFT's SHiRA."
        )
    with open_tensor_file(directory / WEIGHTS_NAME) as tensors:
        if kind == PEFT_TYPE:
            yield read_shira(directory, data, tensors, live_base)
        else:
            yield read_native(directory, data, tensors)
