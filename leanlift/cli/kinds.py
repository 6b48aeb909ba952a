"""Whether a checkpoint's config.json is of a causal language model that leanlift can train.

transformers' own tables say which kinds there are; they are read out of its source, since
importing it takes seconds.
"""

from __future__ import annotations

import ast
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from leanlift.errors import UserError
from leanlift.io.bounded import MOST_OF_A_STRANGER
from leanlift.io.files import read_json

TABLES = {
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": ("modeling_auto.py",),
    "CONFIG_MAPPING_NAMES": ("auto_mappings.py", "configuration_auto.py"),
}


def check_kind(directory: Path, name: str, trusted: bool) -> None:
    """Refuse a base of a kind that is known and no causal language model.

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
    if trusted or "auto_map" in config or not isinstance(kind, str):
        return
    causal, known = (_names(table) for table in TABLES)
    if causal and kind in known and kind not in causal:
        raise UserError(
            f"the base {name} is of the kind {kind}, which is no causal language model: leanlift "
            "trains what transformers' AutoModelForCausalLM loads."
        )


@cache
def _names(table: str) -> frozenset[str]:
    """The keys of a table of transformers'; none where it is not as it is known."""
    with suppress(OSError, SyntaxError, ImportError, ValueError):
        spec = find_spec("transformers")
        for place in (spec and spec.submodule_search_locations) or ():
            for file in TABLES[table]:
                path = Path(place) / "models" / "auto" / file
                found = _keys(path, table) if path.is_file() else frozenset()
                if found:
                    return found
    return frozenset()


def _keys(path: Path, table: str) -> frozenset[str]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        named = isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == table
        value = getattr(node, "value", None)
        if named and isinstance(value, ast.Call) and value.args:
            return frozenset(key for key, _ in ast.literal_eval(value.args[0]))
    return frozenset()
