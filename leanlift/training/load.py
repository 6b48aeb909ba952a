"""The base of an adapter, loaded as it was trained over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from leanlift.adapters import Adapter
from leanlift.errors import UserError
from leanlift.model.targets import ends_in
from leanlift.training.arguments import RunArguments
from leanlift.training.base import load_model


def load_as_trained(adapter: Adapter, base: str | Path | None, device: torch.device) -> Any:
    """The base of an adapter in the dtype and quantization that it was trained over.

    Args:
        adapter: an opened adapter.
        base: directory or hub name; by default the one the adapter names.
        device: where it goes.

    Raises:
        UserError: as for `load_model` and `arguments_as_trained`.
    """
    args = arguments_as_trained(adapter)
    if base is not None:
        args = replace(args, model_name_or_path=str(base), model_revision=None)
    whole = adapter.config.modules_to_save  # a head is in 16 bits, whatever else is not
    chosen = [n for n in adapter.base.shapes if not any(ends_in(n, end) for end in whole)]
    formats = {adapter.base.formats[name].kind for name in chosen}
    return load_model(args, device, experts_too=len(formats) == 1, modules=chosen)


def arguments_as_trained(adapter: Adapter) -> RunArguments:
    """What to ask `load_model` for, to get the base that an adapter was trained over; ends in INT8
    are the adapter's own matter.

    Raises:
        UserError: matrices in several formats, which transformers cannot be asked for; a model of
            another kind than those that write text.
    """
    if adapter.task is not None:
        raise UserError(
            f"{adapter.directory} is an adapter of a {adapter.task.architecture}, which has no "
            "logits over a vocabulary to write text by: load it with transformers and load_adapter."
        )
    formats = {adapter.base.formats[name] for name in adapter.base.shapes}
    quantized = {fmt for fmt in formats if fmt.kind != "dense"}
    formats = quantized or formats  # experts are not, beside Linears that are
    if len(formats) > 1:
        raise UserError(
            f"{adapter.directory} was trained over {', '.join(sorted(map(str, formats)))} at once: "
            "load such a base yourself, then use load_adapter."
        )
    fmt = formats.pop()
    four = fmt.kind in ("nf4", "fp4")
    return RunArguments(
        model_name_or_path=adapter.base.name,
        model_revision=adapter.base.revision,
        dataset_name="",
        load_in_4bit=four,
        load_in_8bit=fmt.kind == "int8",
        bnb_4bit_quant_type=fmt.kind if four else "nf4",
        bnb_4bit_use_double_quant=fmt.double or not four,
        dtype=adapter.base.dtype,
    )
