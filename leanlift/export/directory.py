"""What lies beside the weights of a checkpoint: configuration, tokenizer, and room on the disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from leanlift.checkpoint import write_json
from leanlift.errors import UserError
from leanlift.quantized import dtype_name, dtype_of

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
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
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
            f"{output.name} needs {needed / 2**30:.1f} GiB, but only {free / 2**30:.1f} GiB are "
            f"free at {place}: make room, or name another output directory."
        )


def carry_over(
    source: Path, adapter: Path, output: Path, config: dict[str, Any], dtype: str
) -> None:
    """Write config.json with the new dtype and copy every small file of the base.

    The adapter's tokenizer and chat template win, being what was trained with.

    Args:
        source: the base checkpoint.
        adapter: the adapter's directory.
        output: where the files go.
        config: the base's config.json.
        dtype: of the merged weights.
    """
    for file in sorted(source.iterdir()):
        skip = file.suffix in WEIGHT_SUFFIXES or file.name.endswith(".index.json")
        if file.is_file() and not skip and not file.name.startswith((".", "README")):
            shutil.copyfile(file, output / file.name)
    copy_tokenizer(adapter, output)
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    _set_dtype(config, dtype)
    write_json(output / "config.json", config)


def copy_tokenizer(source: Path, output: Path) -> None:
    """Copy what there is of a tokenizer and its chat template.

    Raises:
        UserError: a file of an adapter is a link to somewhere else on this machine.
    """
    inside = source.resolve()
    cache = inside.parent.parent / "blobs"  # a snapshot of the hub is made of links to there
    for name in TOKENIZER_FILES:
        file = source / name
        if not file.is_file():
            continue
        target = file.resolve()
        if not (target.is_relative_to(inside) or target.is_relative_to(cache)):
            raise UserError(f"{file} is a link to {target}, outside of its directory: remove it.")
        shutil.copyfile(file, output / name)


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    config.pop("torch_dtype", None)
    config["dtype"] = dtype_name(dtype_of(dtype))
    for value in config.values():
        if isinstance(value, dict) and ("dtype" in value or "torch_dtype" in value):
            _set_dtype(value, dtype)
