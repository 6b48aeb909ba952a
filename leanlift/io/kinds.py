"""Which of transformers' Auto classes loads a checkpoint, by its configuration alone.

A causal language model is one where transformers' own tables say so; else a model of images and
text, or of sound and text, is taken for the language model that is in it. Some kinds are in two
tables: their text part alone is loaded then, unless rows have images. The tables are read out of
transformers' source, since importing it takes seconds.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CAUSAL = "AutoModelForCausalLM"
IMAGES = "AutoModelForImageTextToText"
SOUND = "AutoModelForMultimodalLM"
"""Of sound or of several kinds; those of images are in the table of these too."""

FILES = ("modeling_auto.py",)
CLASSES = {
    CAUSAL: "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    IMAGES: "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    SOUND: "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
}
"""Auto classes, in the order in which they are taken, and transformers' tables of them."""

CONFIGURATIONS = ("auto_mappings.py", "configuration_auto.py")
KNOWN = "CONFIG_MAPPING_NAMES"


def auto_class_name(config: Mapping[str, Any], images: bool = False) -> str | None:
    """The Auto class that loads a model; None: none of them does.

    Args:
        config: of the checkpoint, as JSON has it.
        images: whether the part that sees is wanted too, where a kind has a class without it.
    """
    order = (IMAGES, CAUSAL, SOUND) if images else tuple(CLASSES)
    own = config.get("auto_map")
    if isinstance(own, Mapping):  # code that comes with the checkpoint says what it is for
        named = next((name for name in order if name in own), None)
        if named is not None:
            return named
    kind = config.get("model_type")
    return next((name for name in order if kind in classes_of(name)), None)


def no_language_model(name: str, kind: str) -> str:
    """What is said of a base that no Auto class of these loads."""
    return (
        f"the base {name} is of the kind {kind}, which is no causal language model, nor one of "
        "images or sound with one in it: leanlift trains what transformers' "
        f"{', '.join(list(CLASSES)[:-1])} and {list(CLASSES)[-1]} load."
    )


def has_encoder(config: Mapping[str, Any], images: bool = False) -> bool:
    """Whether what a configuration says is loaded reads with an encoder and writes with a decoder.

    Some kinds have a class of their decoder alone, which is a causal language model; a checkpoint
    of that says so. The arguments are those of `auto_class_name`.
    """
    if config.get("is_encoder_decoder") is not True:
        return False
    kind, names = auto_class_name(config, images), config.get("architectures")
    own = config.get("auto_map")
    if kind != CAUSAL or (isinstance(own, Mapping) and kind in own):
        return kind != CAUSAL
    named = set(map(str, names)) if isinstance(names, list) else set()
    return not named <= set(classes_of(CAUSAL).values())


def with_encoder(name: str, kind: str) -> str:
    """What is said of a base that reads with an encoder."""
    return (
        f"the base {name} ({kind}) reads with an encoder and writes with a decoder, and leanlift "
        "trains models that go on with their own text: name one of those."
    )


def is_known(kind: str) -> bool:
    """Whether transformers has a configuration of that kind."""
    return kind in _table(KNOWN, CONFIGURATIONS)


def classes_of(name: str) -> dict[str, str]:
    """The classes of an Auto class by kind of model; none where its table is not as it is known."""
    return _table(CLASSES[name], FILES)


@cache
def _table(table: str, files: tuple[str, ...]) -> dict[str, str]:
    with suppress(OSError, SyntaxError, ImportError, ValueError):
        spec = find_spec("transformers")
        for place in (spec and spec.submodule_search_locations) or ():
            for file in files:
                path = Path(place) / "models" / "auto" / file
                found = _read(path, table) if path.is_file() else {}
                if found:
                    return found
    return {}


def _read(path: Path, table: str) -> dict[str, str]:
    """A table of pairs, without what another table puts into it."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        named = isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == table
        value = getattr(node, "value", None)
        if named and isinstance(value, ast.Call) and value.args:
            pairs = getattr(value.args[0], "elts", ())
            return dict(ast.literal_eval(pair) for pair in pairs if isinstance(pair, ast.Tuple))
    return {}
