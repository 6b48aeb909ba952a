"""What stock transformers makes of a checkpoint: the form of its weights, and what loading takes.

transformers itself is not imported: its configuration is looked at as it comes.
"""

from __future__ import annotations

from typing import Any

from leanlift.errors import UserError

LOADED_AT_ONCE = 4
"""Unquantized matrices of the largest kind that transformers' loader holds, at most, beside what it
has placed already: its threads read ahead while one matrix is quantized."""


def loading_nbytes(placed: int, largest: int) -> int:
    """Peak while a model is loaded and quantized matrix by matrix.

    Args:
        placed: bytes of the model when it is there.
        largest: bytes of its largest matrix before it is quantized.
    """
    return placed + LOADED_AT_ONCE * largest


def stored_quantization(config: Any, name: str) -> dict[str, Any] | None:
    """How the weights of a checkpoint are quantized on disk; None where they are not.

    Args:
        config: its configuration, as transformers read it.
        name: of the base, for messages.

    Raises:
        UserError: in a form that leanlift cannot train over.
    """
    text = config.get_text_config()
    for holder in (config, text):
        for key in ("quantization_config", "compression_config"):
            found = getattr(holder, key, None)
            if not found:
                continue
            data = found if isinstance(found, dict) else found.to_dict()
            four, eight = data.get("load_in_4bit"), data.get("load_in_8bit")
            method = data.get("quant_method") or ("bitsandbytes" if four or eight else "unknown")
            method = str(getattr(method, "value", method))
            if method != "bitsandbytes" or not (four or eight):
                raise UserError(
                    f"the base {name} is quantized on disk ({method:.40}), and leanlift trains "
                    "over 16-bit checkpoints and those that bitsandbytes has quantized (NF4, FP4, "
                    "INT8): name the 16-bit checkpoint that it was made from."
                )
            return data
    return None
