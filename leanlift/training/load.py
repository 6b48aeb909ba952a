"""Loading the base with stock transformers; every way in which that fails is one sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from leanlift.adapter import Adapter
from leanlift.errors import UserError, first_line
from leanlift.export.source import open_checkpoint
from leanlift.memory import is_out_of_memory
from leanlift.quantized import dtype_of
from leanlift.training.arguments import RunArguments


def load_base(args: RunArguments, device: torch.device, trust_remote_code: bool = False) -> Any:
    """The base model, quantized as asked for.

    Raises:
        UserError: missing, half-downloaded or damaged checkpoint, unknown model type,
            contradictory settings.
    """
    name = args.model_name_or_path
    check_base(name)
    dtype = dtype_of(args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        prequantized = getattr(config, "quantization_config", None) is not None
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            quantization_config=None if prequantized else quantization(args, dtype),
            device_map={"": device.index or 0} if device.type == "cuda" else None,
            attn_implementation=args.attn_implementation,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, ImportError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"the base {name} cannot be loaded: {first_line(error)}") from error
    return model


def check_base(name: str) -> None:
    """What can be seen of a base without loading it.

    Raises:
        UserError: a directory that is not there, is no checkpoint, or was only half downloaded.
    """
    path = Path(name).expanduser()
    if not path.exists() and (
        path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    ):
        raise UserError(
            f"the base {name} does not exist: expected a checkpoint directory or hub name."
        )
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"the base {name} has no config.json: it is no checkpoint directory.")
        with open_checkpoint(path):  # headers only: finds missing and cut-off shards
            pass


def quantization(args: RunArguments, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """The bitsandbytes configuration that the arguments ask for."""
    if args.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if not args.load_in_4bit:
        return None
    if args.bnb_4bit_quant_type not in ("nf4", "fp4"):
        raise UserError(
            f"expected bnb_4bit_quant_type nf4 or fp4, got {args.bnb_4bit_quant_type!r}."
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=args.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def load_as_trained(adapter: Adapter, base: str | Path | None, device: torch.device) -> Any:
    """The base of an adapter in the dtype and quantization that it was trained over.

    Args:
        adapter: an opened adapter.
        base: directory or hub name; by default the one the adapter names.
        device: where it goes.

    Raises:
        UserError: as for `load_base` and `arguments_as_trained`.
    """
    args = arguments_as_trained(adapter)
    if base is not None:
        args = replace(args, model_name_or_path=str(base))
    return load_base(args, device)


def arguments_as_trained(adapter: Adapter) -> RunArguments:
    """What to ask `load_base` for, to get the base that an adapter was trained over; ends in INT8
    are the adapter's own matter.

    Raises:
        UserError: matrices in several formats, which transformers cannot be asked for.
    """
    formats = {adapter.base.formats[name] for name in adapter.base.shapes}
    if len(formats) > 1:
        raise UserError(
            f"{adapter.directory} was trained over {', '.join(sorted(map(str, formats)))} at once: "
            "load such a base yourself, then use load_adapter."
        )
    fmt = formats.pop()
    four = fmt.kind in ("nf4", "fp4")
    return RunArguments(
        model_name_or_path=adapter.base.name,
        dataset_name="",
        load_in_4bit=four,
        load_in_8bit=fmt.kind == "int8",
        bnb_4bit_quant_type=fmt.kind if four else "nf4",
        bnb_4bit_use_double_quant=fmt.double or not four,
        dtype=adapter.base.dtype,
    )
