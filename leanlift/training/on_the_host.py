"""A base that is loaded onto the host, and quantized on the card that it will be copied to.

Stock transformers quantizes a matrix where it loads it. A base that is streamed is loaded onto the
host, whose processor would take minutes for it and may round a value in another way. So each matrix
goes to the card for that, as it would have if the base were loaded there, and comes back: the card
holds one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.integrations.bitsandbytes import Bnb4bitQuantize, Bnb8bitQuantize

from leanlift.weights import stacks

CPU = torch.device("cpu")


@contextmanager
def quantizing_on(device: torch.device) -> Iterator[None]:
    """While a model is loaded onto the host, its matrices are quantized on `device`."""
    stock = {kind: kind.convert for kind in (Bnb4bitQuantize, Bnb8bitQuantize)}
    holder: Any = stacks  # experts are quantized there, as they are read
    requantize = holder.requantize

    def through(convert: Any) -> Any:
        def converted(self: Any, input_dict: dict[str, Any], *rest: Any, **more: Any) -> Any:
            there = {key: _on(value, device) for key, value in input_dict.items()}
            made = convert(self, there, *rest, **more)
            return {key: _on(value, CPU) for key, value in made.items()}

        return converted

    def requantized(weight: Any, fmt: Any, _: torch.device) -> Any:
        held = requantize(weight, fmt, device)
        held.module.to(CPU)
        return held

    try:
        for kind, convert in stock.items():
            kind.convert = through(convert)
        holder.requantize = requantized
        yield
    finally:
        for kind, convert in stock.items():
            kind.convert = convert
        holder.requantize = requantize


def _on(value: Any, device: torch.device) -> Any:
    """A tensor, or a list of some, on a device."""
    if isinstance(value, list):
        return [_on(each, device) for each in value]
    return value.to(device)
