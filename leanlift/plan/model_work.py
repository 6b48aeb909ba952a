"""What a model has to compute, read from a fake one with layers of ours: see `work`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from leanlift.model.blocks import block_lists
from leanlift.model.kept_blocks import recomputed_blocks
from leanlift.plan.work import Matrix, ModelWork
from leanlift.tiles import parts_of


def model_work(
    model: Any,
    head: tuple[int, int],
    layers: Mapping[str, Any],
    entries: Mapping[str, int],
    dtype: torch.dtype,
    tiled: Iterable[str] = (),
) -> ModelWork:
    """Of a fake model with layers of ours.

    Args:
        model: attached.
        head: vocabulary and width.
        layers: of ours, by name.
        entries: that are trained, of each of them that has some.
        dtype: of the computation.
        tiled: the names of MLPs that go over long rows in pieces.
    """
    inside = tuple(f"{name}." for name in tiled)
    paths = [f"{path}." for path in block_lists(model)]
    text = _text_config(model)
    ends = model.get_output_embeddings()
    matrices = []
    for name, layer in layers.items():
        if layer is ends:  # which is the loss's
            continue
        weight = layer.weight_tiles
        (m, n), parts = weight.shape, parts_of(weight)
        held = weight.format.held_nbytes(weight.shape)
        made = bool(layer.needs_scratch(dtype))
        block = _block_of(name, paths)
        share = min(1.0, _chosen(_of_block(text, block or 0), parts) / parts)
        each = name.startswith(inside) if inside else False
        matrices.append(Matrix(block, m, n, entries.get(name, 0), share, held, made, each))
    blocks = 1 + max((m.block for m in matrices if m.block is not None), default=-1)
    attention = tuple(_attention(text, number) for number in range(blocks))
    return ModelWork(tuple(matrices), attention, len(recomputed_blocks(model)), head)


def _block_of(name: str, paths: Iterable[str]) -> int | None:
    path = next((path for path in paths if name.startswith(path)), None)
    return None if path is None else int(name.removeprefix(path).partition(".")[0])


def _text_config(model: Any) -> Any:
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _chosen(text: Any, parts: int) -> int:
    """Experts that a token meets; all where a configuration does not say it."""
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
    return next((c for name in names if isinstance(c := getattr(text, name, None), int)), parts)


def _attention(text: Any, block: int) -> tuple[int, int | None]:
    """Numbers of all heads of a token, and how far it looks back."""
    own = _of_block(text, block)
    heads = getattr(own, "num_attention_heads", None)
    width = getattr(own, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(width, int):
        return 0, None
    each = getattr(own, "head_dim", None) or width // heads
    kinds = getattr(text, "layer_types", None) or ()
    window = getattr(text, "sliding_window", None)
    slides = not kinds or (block < len(kinds) and "sliding" in str(kinds[block]))
    return heads * int(each), window if slides and isinstance(window, int) else None


def _of_block(text: Any, block: int) -> Any:
    """The configuration of a block, where some sizes differ from block to block: of those that do,
    transformers lets nobody ask the model's."""
    blocks = getattr(text, "per_layer_config", None) or ()
    return blocks[min(block, len(blocks) - 1)] if len(blocks) else text
