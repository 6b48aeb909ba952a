"""A base whose experts are never there in 16 bits: quantized row tile by row tile as they are read.

bitsandbytes quantizes Linears alone, so stock transformers would first load the experts of a
mixture as they are stored: 54 GiB of Qwen3-30B-A3B, where its 4-bit form has 15. Stock transformers
stays the loader; while it loads, stacks of experts are taken out of the model that it fills, and
put in from the files (`leanlift.source` knows which rows of which tensors they are) when the rest
is there. What this makes is bit-equal to loading everything and `quantize_experts`.

Left to that other way: stacks whose place on disk is not known or not of their shape, checkpoints
without safetensors, models on several devices, and models in which nothing is quantized.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, Mxfp4Config, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from leanlift.layers import Workspace
from leanlift.model.stacks import (
    format_of_linears,
    named_parts,
    put_frozen,
    quantize_experts,
)
from leanlift.source import (
    JoinedRows,
    find,
    keys_while_loading,
    layout_of,
    open_files,
    plain_view,
    without_mxfp4,
)
from leanlift.tiles import CastTiles
from leanlift.weights.quantized import dtype_name, is_quantized
from leanlift.weights.stacks import ExpertStack, quantized_stack

logger = logging.getLogger("leanlift")


WHERE = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
"""Settings of `from_pretrained` that say where a configuration is."""


def load_in_few_bits(
    auto: Any, name: str | Path, trust_remote_code: bool = False, **settings: Any
) -> Any:
    """`auto.from_pretrained(name, **settings)`, with the experts of a mixture held as its quantized
    Linears are, and quantized while they are read.

    Args:
        auto: `AutoModelForCausalLM`, or another class of transformers that loads a model.
        name: a checkpoint directory or hub name. Experts that are stored in MXFP4 are read, too.
        trust_remote_code: whether code of the checkpoint's own may run.
        settings: of `from_pretrained`, `quantization_config` among them. Where that is missing, so
            that nothing is quantized, experts stay as they are loaded.

    Returns:
        What `from_pretrained` returns.
    """
    plain = _of_mxfp4(name, trust_remote_code, settings)
    if settings.get("quantization_config") is not None and plain is not None:
        settings["config"] = plain
    with experts_as_they_are_read():
        loaded = load_with_experts_as_stored(auto, name, trust_remote_code, **settings)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    left = [name for name, part in named_parts(model).items() if isinstance(part, ExpertStack)]
    if left and format_of_linears(model) is not None:
        logger.warning(
            "%d stacks of experts (%s, …) were loaded in %s before they were quantized: which rows "
            "of the checkpoint they are is not known.",
            len(left), left[0], dtype_name(model.dtype),
        )  # fmt: skip
    quantize_experts(model)
    return loaded


def load_with_experts_as_stored(
    auto: Any, name: str | Path, trust_remote_code: bool = False, **settings: Any
) -> Any:
    """`auto.from_pretrained(name, **settings)`, with experts in 16 or 32 bits; the arguments are
    those of `load_in_few_bits`."""
    quantized = settings.get("quantization_config") is not None
    if not quantized and _of_mxfp4(name, trust_remote_code, settings) is not None:
        settings["quantization_config"] = Mxfp4Config(dequantize=True)
    return auto.from_pretrained(name, trust_remote_code=trust_remote_code, **settings)


def _of_mxfp4(name: str | Path, trust_remote_code: bool, settings: Mapping[str, Any]) -> Any | None:
    """The configuration of a checkpoint with experts in MXFP4, as that of a 16-bit one."""
    config = settings.get("config")
    if config is None:
        where = {key: value for key, value in settings.items() if key in WHERE}
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **where)
    return without_mxfp4(config)


@contextmanager
def experts_as_they_are_read() -> Iterator[None]:
    """While a model is loaded, its stacks of experts are quantized as they are read, wherever its
    Linears are quantized."""
    stock = PreTrainedModel._load_pretrained_model

    def load(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *more: Any
    ) -> Any:
        rest = state_dict, checkpoint_files, load_config, *more
        device = _one_device(load_config.device_map)
        files = [Path(file) for file in checkpoint_files or ()]
        usual = state_dict is not None or any(file.suffix != ".safetensors" for file in files)
        if usual or device is None or not any(map(is_quantized, model.modules())):
            return stock(model, *rest)
        model._weight_conversions = load_config.weight_mapping  # as loading itself will set them
        with open_files(files) as tensors:
            stacks = _stacks_on_disk(model, tensors, load_config.dtype_plan or {})
            for name in stacks:
                owner, leaf = _owner(model, name)
                delattr(owner, leaf)
            found, index = stock(model, *rest)
            live = {key: tuple(value.shape) for key, value in model.state_dict().items()}
            taken = {part for stack in stacks.values() for part in stack.names}
            found.unexpected_keys -= keys_while_loading(model, taken, live)
            _quantize(model, stacks, device)
        return found, index

    PreTrainedModel._load_pretrained_model = staticmethod(load)
    try:
        yield
    finally:
        PreTrainedModel._load_pretrained_model = staticmethod(stock)


@dataclass(frozen=True)
class _Stack:
    """A stack of experts on disk.

    Attributes:
        rows: of all its experts, as they are stored.
        parts: how many experts.
        dtype: in which it would have been loaded.
        names: of the tensors of the files that it is made of.
    """

    rows: JoinedRows
    parts: int
    dtype: torch.dtype
    names: set[str]


def _stacks_on_disk(model: Any, tensors: Any, dtypes: Mapping[str, Any]) -> dict[str, _Stack]:
    """The stacks of a model without contents that can be read by rows, by name.

    Args:
        model: whose Parameters have the dtypes in which they will be loaded, but for
        dtypes: those of other names.
        tensors: of its checkpoint.
    """
    parts = {n: part for n, part in named_parts(model).items() if isinstance(part, ExpertStack)}
    if dtypes:
        named = build_glob_alternation(list(dtypes))[0]
        parts = {name: part for name, part in parts.items() if not named.search(name)}
    stored = plain_view(tensors)
    live = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    shapes = {name: tuple(part.weight.shape) for name, part in parts.items()}
    disk = {key: tensor.shape for key, tensor in stored.items()}
    layout, stacks = layout_of(model, disk, live, shapes), {}
    for name, stack in parts.items():
        experts, m, n = stack.weight.shape
        rows = find(f"{name}.weight", stored, layout)
        if isinstance(rows, JoinedRows) and rows.shape == (experts * m, n):
            names = {one for part in rows.parts.values() for one in part.stored_names}
            stacks[name] = _Stack(rows, experts, stack.weight.dtype, names)
    return stacks


def _quantize(model: Any, stacks: Mapping[str, _Stack], device: torch.device) -> None:
    """Read stacks, and put them in where they were taken out."""
    fmt, workspace = format_of_linears(model), Workspace()
    assert fmt is not None
    for name in tqdm(stacks, desc="Quantizing experts", unit="stack", disable=not stacks):
        stack = stacks[name]
        rows = CastTiles(stack.rows, stack.dtype)  # type: ignore[arg-type]
        held = quantized_stack(rows, stack.parts, fmt, device)
        experts = put_frozen(model, name, held, workspace)
        for module in experts.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, leaf = name.rpartition(".")
    return model.get_submodule(parent), leaf


def _one_device(device_map: Mapping[str, Any] | None) -> torch.device | None:
    """Where a whole model goes; None where its parts go to different places."""
    places = set((device_map or {"": "cpu"}).values())
    if len(places) != 1 or "disk" in places:
        return None
    (place,) = places
    return torch.device(place)
