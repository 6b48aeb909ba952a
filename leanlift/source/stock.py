"""What stock transformers makes of a checkpoint: the form of its weights, and what loading takes.

transformers itself is not imported: its configuration is looked at as it comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from leanlift.errors import UserError

LOADED_AT_ONCE = 4
"""Unquantized matrices of the largest kind that transformers' loader holds, at most, beside what it
has placed already: its threads read ahead while one matrix is quantized."""


def loading_nbytes(placed: int, largest: int, by_tiles: int = 0) -> int:
    """Peak while a model is loaded and quantized matrix by matrix, and stacks of experts by tiles.

    Args:
        placed: bytes of the model when it is there.
        largest: bytes of its largest matrix before it is quantized.
        by_tiles: bytes that the largest stack takes while it is.
    """
    return placed + max(LOADED_AT_ONCE * largest, by_tiles)


def has_mxfp4(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a model whose experts are stored in MXFP4, as those of GPT-OSS
    are, the only ones that transformers reads."""
    stored = config.get("quantization_config")
    if config.get("model_type") != "gpt_oss" or not isinstance(stored, dict):
        return False
    return _method(stored) == "mxfp4"


def without_mxfp4(config: Any) -> Any | None:
    """The configuration of a checkpoint whose experts are stored in MXFP4, as that of a 16-bit one;
    None for any other."""
    if not has_mxfp4(config.to_dict()):
        return None
    plain = deepcopy(config)
    del plain.quantization_config
    return plain


def stored_quantization(config: Any, name: str) -> dict[str, Any] | None:
    """How the weights of a checkpoint are quantized on disk; None where they are not, but for
    experts in MXFP4, which are read as what they are (`leanlift.source.mxfp4`).

    Args:
        config: its configuration, as transformers read it.
        name: of the base, for messages.

    Raises:
        UserError: in a form that leanlift cannot train over.
    """
    data = _stored(config)
    if data is None or has_mxfp4(config.to_dict()):
        return None
    few_bits = data.get("load_in_4bit") or data.get("load_in_8bit")
    if _method(data) != "bitsandbytes" or not few_bits:
        raise UserError(
            f"the base {name} is quantized on disk ({_method(data):.40}), and leanlift trains over "
            "16-bit checkpoints, those that bitsandbytes has quantized (NF4, FP4, INT8) and "
            "GPT-OSS's in MXFP4: name the 16-bit checkpoint that it was made from."
        )
    return data


def _stored(config: Any) -> dict[str, Any] | None:
    """What a configuration says of how weights are quantized."""
    for holder in (config, config.get_text_config()):
        for key in ("quantization_config", "compression_config"):
            found = getattr(holder, key, None)
            if found:
                return found if isinstance(found, dict) else dict(found.to_dict())
    return None


def _method(data: dict[str, Any]) -> str:
    few_bits = data.get("load_in_4bit") or data.get("load_in_8bit")
    method = data.get("quant_method") or ("bitsandbytes" if few_bits else "unknown")
    return str(getattr(method, "value", method))
