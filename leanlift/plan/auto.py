"""The Auto class of transformers that a configuration belongs to; whoever makes a model asks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import nn

from leanlift.errors import UserError
from leanlift.io.kinds import (
    CAUSAL,
    IMAGES,
    SOUND,
    auto_class_name,
    classes_of,
    has_encoder,
    is_known,
    no_language_model,
    with_encoder,
)


def auto_class(config: Any, name: str, images: bool = False) -> Any:
    """The Auto class that loads a model; see `leanlift.io.kinds`.

    Args:
        config: its configuration, as transformers read it.
        name: of the base, for messages.
        images: whether the part that sees is wanted too.

    Raises:
        UserError: transformers knows the kind, and no class with a language model in it.
    """
    found = _name(config, images)
    if has_encoder(_read(config), images):
        raise UserError(with_encoder(name, config.model_type))
    if found is None and is_known(config.model_type):
        raise UserError(no_language_model(name, config.model_type))
    return getattr(transformers, found or CAUSAL)  # what somebody has registered is one of text


def takes_images(name: str, revision: str | None = None, trust_remote_code: bool = False) -> bool:
    """Whether a base, as its configuration says, is a model of images and text."""
    try:
        config = transformers.AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception:  # whatever is wrong with it, loading the base says so
        return False
    return _name(config, True) == IMAGES


def how_loaded(config: Any, images: bool) -> str | None:
    """What a model that sees or hears is loaded as, in words; None: it is one of text alone."""
    kind, whole = _name(config, images), _name(config, True)
    if kind is None or config.model_type not in {**classes_of(IMAGES), **classes_of(SOUND)}:
        return None
    made = classes_of(kind).get(config.model_type, config.model_type)
    if kind != whole and made != classes_of(IMAGES).get(config.model_type):
        return f"loaded by {kind} as {made}: the text part of the checkpoint alone."
    return f"loaded by {kind} as {made}: the language model in it is trained, the rest is frozen."


def auto_class_with(config: Any, name: str, modules: Iterable[str]) -> Any:
    """The Auto class whose model has modules of these names: of a kind that is loaded with and
    without its part that sees, an adapter's names tell how it was trained.

    Raises:
        UserError: as `auto_class`.
    """
    plain, seeing = (auto_class(config, name, images) for images in (False, True))
    if plain is seeing or _name(config, True) != IMAGES:
        return plain
    with torch.device("meta"):
        model: nn.Module = plain.from_config(config)
    known = {each for each, _ in (*model.named_modules(), *model.named_parameters())}
    return plain if known.issuperset(modules) else seeing


def parts_left_out(config: Any, name: str, model: nn.Module) -> set[str]:
    """What the modules and tensors beside the language model are called, of a kind that was loaded
    as its text part alone; none where a model is the whole of its checkpoint.

    Args:
        config: of the checkpoint.
        name: of the base, for messages.
        model: what was loaded of it.
    """
    whole = auto_class(config, name, images=True)
    made = classes_of(IMAGES).get(config.model_type)
    if whole is auto_class(config, name) or type(model).__name__ == made:
        return set()
    with torch.device("meta"):
        seeing: nn.Module = whole.from_config(config)
    embedding = seeing.get_input_embeddings()  # type: ignore[operator]
    path = next(each for each, module in seeing.named_modules() if module is embedding).split(".")
    beside: set[str] = set()
    for depth in range(len(path)):
        parent = seeing.get_submodule(".".join(path[:depth]))
        beside |= {key for key, _ in parent.named_children()} - {path[depth]}
        beside |= {key for key, _ in parent.named_parameters(recurse=False)}
    return beside.difference(*(key.split(".") for key, _ in model.named_modules()))


def _name(config: Any, images: bool) -> str | None:
    return auto_class_name(_read(config), images)


def _read(config: Any) -> dict[str, Any]:
    """What of a configuration says how it is loaded, as JSON has it."""
    keys = ("model_type", "auto_map", "architectures", "is_encoder_decoder")
    return {key: getattr(config, key, None) for key in keys}
