"""What lies beside the weights of a checkpoint: configuration, tokenizer, and room on the disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from leanlift.errors import UserError
from leanlift.io.hub import inside, local_copy
from leanlift.io.tensors import write_json
from leanlift.source import has_mxfp4
from leanlift.weights.quantized import dtype_name, dtype_of

WEIGHT_SUFFIXES = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".ckpt",
}

BASE_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
"""What is wanted of a base on the hub."""


def resolve_base(base: str | Path, revision: str | None = None) -> Path:
    """A local directory, or the local snapshot of a hub name at a revision.

    Raises:
        UserError: neither.
    """
    return local_copy(
        base, BASE_FILES, "the base", "name the base checkpoint with --base", revision
    )


def check_space(output: Path, needed: int) -> None:
    """Refuse to start what the disk cannot hold.

    Raises:
        UserError: fewer than `needed` bytes are free where `output` will be.
    """
    place = next(path for path in (output, *output.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"{output.name} needs {_size(needed)}, but only {_size(free)} are free at {place}: "
            "make room, or name another output directory."
        )


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def carry_over(source: Path, output: Path) -> list[str]:
    """Copy every small file of the base.

    Returns:
        The names of those that were not: they are links out of the base's directory, which an
        adapter may name.
    """
    skipped = []
    for file in sorted(source.iterdir()):
        skip = file.suffix in WEIGHT_SUFFIXES or file.name.endswith(".index.json")
        if not file.is_file() or skip or file.name.startswith((".", "README")):
            continue
        target = inside(source, file)
        if target is None:
            skipped.append(file.name)
        else:
            shutil.copyfile(target, output / file.name)
    return skipped


def write_config(config: dict[str, Any], output: Path, dtype: str) -> None:
    """Write config.json for merged weights of `dtype`."""
    config = {
        key: value
        for key, value in config.items()
        if key not in ("quantization_config", "compression_config")
    }
    _set_dtype(config, dtype)
    write_json(output / "config.json", config)


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    config.pop("torch_dtype", None)
    config["dtype"] = dtype_name(dtype_of(dtype))
    for value in config.values():
        if isinstance(value, dict) and ("dtype" in value or "torch_dtype" in value):
            _set_dtype(value, dtype)


def check_form(config: dict[str, Any], onto: str, directory: Path) -> None:
    """Refuse a checkpoint that is quantized itself, which has no 16-bit weights to add to; experts
    in MXFP4 are 16-bit numbers as they are read.

    Raises:
        UserError: says what to name instead.
    """
    if config.get("quantization_config") and onto == "original" and not has_mxfp4(config):
        raise UserError(
            f"{directory} is itself a quantized checkpoint: name the 16-bit checkpoint it was "
            "made from with --base, or take --onto quantized, which adds to what it holds."
        )


UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: str | int) -> int:
    """Bytes from "2GB" (decimal) or "2GiB" (binary), as save_pretrained reads them."""
    if isinstance(size, int):
        return size
    text = size.strip().upper()
    for unit in sorted(UNITS, key=len, reverse=True):
        number = text.removesuffix(unit)
        if number != text:
            try:
                return int(float(number) * UNITS[unit])
            except ValueError:
                break
    raise UserError(f'expected a shard size such as "2GB" or "500MB", got {size!r}.')
