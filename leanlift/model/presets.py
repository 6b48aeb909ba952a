"""What part of a block a module is: of what mixes tokens (attention), or of what does not (mlp).

Families name their parts in many ways, but in few words. The parents of a module are asked from
the inside out, up to the block, by the names that they have and by those of their classes; where
none has such a word, the names that the two matrices of a feed-forward part often have decide.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import takewhile

from torch import nn

from leanlift.config import ALL_LINEAR

WORDS = {
    "attention": ("attn", "attention", "mixer", "mamba", "ssm", "conv", "delta", "recurrent",
                  "temporal", "lstm", "time_mix"),
    "mlp": ("mlp", "feed_forward", "feedforward", "ffn", "ff_layer", "expert", "moe", "swiglu",
            "glumb", "dense_relu_dense", "densereludense"),
}  # fmt: skip
"""Parts of the names of a block's parts, by preset. Linear recurrences, scans and convolutions over
tokens stand where attention does."""

FEED_FORWARD = re.compile(
    r"(?:^|\.)(?:(?:fc|ff|lin|w)_?\d|fc_(?:in|out)|wi(?:_\d)?|wo|intermediate\.dense|output\.dense"
    r"|(?:gate|up|down|gate_up)_proj|ffn_output|ffn)$"
)
"""Ends of names of what stands in a block by itself, or in a part of another name."""


def in_preset(names: Mapping[str, nn.Module], name: str, preset: str) -> bool:
    """Whether a preset covers a module.

    Args:
        names: the modules of a model, by name.
        name: of a module inside its blocks.
        preset: one of `leanlift.config.TARGET_PRESETS`.
    """
    return preset == ALL_LINEAR or _part_of(names, name) == preset


def _part_of(names: Mapping[str, nn.Module], name: str) -> str | None:
    """The preset, but for all-linear, that covers a module; None: neither."""
    parts, family = name.split("."), type(names[""]).__name__
    paths = [".".join(parts[:depth]) for depth in range(1, len(parts))]
    lists = [path for path in paths if isinstance(names[path], nn.ModuleList)]
    outermost = len(lists[0].split(".")) - 1 if lists else 0
    for path in reversed(paths[outermost:]):
        kind = type(names[path]).__name__
        shared = takewhile(lambda pair: pair[0] == pair[1], zip(kind, family, strict=False))
        own = kind[len(list(shared)) :]  # of Qwen3MoeAttention, Attention
        words = f"{path.rpartition('.')[2]} {own}".lower()
        for preset in ("mlp", "attention"):
            if any(word in words for word in WORDS[preset]):
                return preset
    return "mlp" if FEED_FORWARD.search(name) else None
