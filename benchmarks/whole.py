"""Of a model that sees or hears: whether a merge has the whole of its checkpoint."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from leanlift import merge_adapter
from leanlift.model.blocks import block_lists


def stock(place: Path) -> Any:
    """The whole model, as stock transformers loads it."""
    from transformers import AutoConfig

    from leanlift.plan.auto import auto_class

    kind = auto_class(AutoConfig.from_pretrained(place), str(place), images=True)
    return kind.from_pretrained(place, dtype=torch.float32)


def check_whole(base: Path, place: Path, load: Any, logits: Any) -> float:
    """Merge onto the original, and compare; by how much the logits of the whole model, merged onto
    the quantized weights, differ from those of its text part alone.

    Raises:
        ValueError: more than the language model has changed.
    """
    off = 0.0
    with suppress(AttributeError):  # one does not run without images
        one, two = stock(place / "merged"), load(place / "merged", quantized=False)
        off = float((logits(one) - logits(two)).abs().max())
    merge_adapter(place / "run", place / "original", dtype="float32", progress=False)
    changed = changed_elsewhere(base, place / "original")
    if changed:
        raise ValueError(changed)
    return off


def changed_elsewhere(base: Path, merged: Path) -> str:
    """What a merge onto the original has changed outside of the language model's blocks, or lacks,
    or has more than the base; "": nothing."""
    names = [set(_tensors(place)) for place in (base, merged)]
    if names[0] != names[1]:
        return f"the merge has other tensors: {sorted(names[0] ^ names[1])[:3]}"
    before, after = stock(base), stock(merged)
    lists = [f"{each}." for each in block_lists(before)]
    found = dict(after.named_parameters())
    other = [
        name
        for name, parameter in before.named_parameters()
        if not any(name.startswith(each) for each in lists)
        and not torch.equal(parameter, found[name])
    ]
    return f"the merge has changed {other[:3]}" if other else ""


def _tensors(place: Path) -> dict[str, Tensor]:
    return {name: t for file in place.glob("*.safetensors") for name, t in load_file(file).items()}
