"""A base as transformers would make it, without contents: what is called how, and what is tied."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from leanlift.errors import UserError, first_line
from leanlift.io.kinds import auto_class_name


def empty_model(directory: Path, modules: Collection[str]) -> tuple[Any, str]:
    """The model of a checkpoint, on the device "meta", and the dtype that it is loaded in.

    Args:
        directory: of the checkpoint; of a kind that is loaded with and without its part that sees,
            it is the one that has these modules.
        modules: names of modules.

    Raises:
        UserError: transformers cannot make it, by its own code alone.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
        told = {"model_type": config.model_type}
        kinds = dict.fromkeys(auto_class_name(told, images) for images in (False, True))
        models = []
        for kind in kinds:
            if kind is not None:
                with torch.device("meta"):
                    models.append(getattr(transformers, kind).from_config(config))
        if not models:
            raise ValueError(f"there is no language model of the kind {config.model_type}")
    except Exception as error:  # a stranger's configuration: anything may be wrong with it
        raise UserError(
            f"{directory} cannot be known as a base without loading it "
            f"({first_line(error).rstrip('.')}): load it yourself, then load_adapter(model, ...)."
        ) from None
    wanted = set(modules)
    fits = (model for model in models if wanted <= {name for name, _ in model.named_modules()})
    dtype = str(config.dtype or torch.float32).removeprefix("torch.")
    return next(fits, models[0]), dtype
