"""Tokens whose rows of the embedding are trained: PEFT's `trainable_token_indices`.

For tokens that were added, or mean something of one's own: a few rows instead of a whole embedding.
Where the output head is tied to the embedding its rows follow, as in PEFT.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from leanlift.adapters import Adapter
from leanlift.adapters.embedding import TrainedEmbedding
from leanlift.config import LiftConfig
from leanlift.errors import MaskError, UserError
from leanlift.layers import LiftEmbedding, TiedHead, Workspace
from leanlift.layers.embedding import FrozenEmbedding
from leanlift.layers.tokens import rows_index
from leanlift.model.embeddings import embed_scale, embeddings_tied
from leanlift.model.resize_embeddings import embedding_size
from leanlift.sparse import SegmentedIndex
from leanlift.weights.quantized import WeightDense
from leanlift.weights.quantized import embedding_rows as rows_of


def embedding_name(model: Any) -> str:
    """The path of the input embedding."""
    embedding = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is embedding)


def check_token_ids(ids: tuple[int, ...], rows: int) -> None:
    """Refuse tokens that an embedding of so many rows has not.

    Raises:
        MaskError: there are some.
    """
    largest = max(ids, default=-1)
    if largest >= rows:
        raise MaskError(
            f"trainable_token_indices has {largest}, but the embedding has {rows} rows: expected "
            "ids below that."
        )


def check_tokens(model: Any, config: LiftConfig, rows: int | None) -> None:
    """Refuse tokens that a model has no row for, or whose embedding cannot be trained.

    Args:
        model: stock, or attached.
        config: what is trained.
        rows: that the embedding grows to; None: it stays.

    Raises:
        MaskError: there are some.
    """
    if not config.trainable_token_indices:
        return
    check_token_ids(config.trainable_token_indices, max(embedding_size(model), rows or 0))
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, (nn.Embedding, FrozenEmbedding, LiftEmbedding)):
        raise MaskError(
            f"the embedding is a {type(embedding).__name__}, of which leanlift trains no tokens: "
            "leave out trainable_token_indices."
        )
    if isinstance(embedding, FrozenEmbedding) and embedding.weight_tiles is None:
        raise MaskError(
            "the embedding is kept on the CPU, where no tokens of it are trained: leave out "
            "embedding_on_cpu, or trainable_token_indices."
        )
    if not isinstance(embedding, LiftEmbedding):
        embed_scale(embedding)


def lift_tokens(
    model: Any,
    ids: tuple[int, ...],
    workspace: Workspace,
    dtype: torch.dtype,
    index: SegmentedIndex | None = None,
) -> None:
    """Make the rows of some tokens trainable, in place; offsets begin at zero.

    Args:
        model: attached, with an embedding of all its rows; frozen.
        ids: of the tokens.
        workspace: of the model's layers.
        dtype: of the offsets.
        index: the positions of the rows; by default made of the ids.
    """
    embedding = model.get_input_embeddings()
    tied = embeddings_tied(model)
    storage: Any = embedding
    weight: Any = WeightDense(embedding)
    if isinstance(embedding, FrozenEmbedding):
        storage, weight = embedding.storage, embedding.weight_tiles
    tokens = torch.tensor(sorted(ids), device=weight.device)
    index = rows_index(tokens, weight.shape) if index is None else index
    layer = LiftEmbedding(
        embedding, partial(rows_of, storage), storage, weight, index, workspace, tokens,
        embed_scale(embedding), dtype,
    )  # fmt: skip
    layer.train(embedding.training)
    names = {module: name for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    model.set_submodule(names[embedding], layer)
    if tied:
        model.set_submodule(names[head], TiedHead(head, layer).train(head.training))


def drop_tokens(model: Any) -> None:
    """Take the trained tokens' offsets off, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LiftEmbedding):
            model.set_submodule(name, module.lookup)
        elif isinstance(module, TiedHead):
            model.set_submodule(name, module.frozen)


def trained_embedding(model: Any) -> TrainedEmbedding | None:
    """The embedding of an attached model, if tokens of it are trained."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if not isinstance(embedding, LiftEmbedding):
        return None
    return TrainedEmbedding(embedding_name(model), embedding.weight_tiles.shape)


def check_embedding(model: Any, adapter: Adapter) -> None:
    """Refuse an adapter whose trained rows are not those of its tokens in this model.

    Raises:
        UserError: they are others.
    """
    trained = adapter.embedding
    if trained is None:
        return
    rows = None if adapter.grown is None else adapter.grown.rows
    check_tokens(model, adapter.config, rows)
    width = model.get_input_embeddings().weight.shape[1]
    name, shape = embedding_name(model), (max(embedding_size(model), rows or 0), width)
    if (trained.module, trained.shape) != (name, shape):
        raise UserError(
            f"{adapter.directory} has trained tokens of {trained.module} {trained.shape}; the "
            f"model has {name} {shape}: load the adapter's own base."
        )
    wanted = rows_index(torch.tensor(sorted(adapter.config.trainable_token_indices)), shape)
    learned = adapter.layer(trained.module)
    if not torch.equal(learned.active.index.counts, wanted.counts) or learned.retired is not None:
        raise UserError(
            f"{adapter.directory} has rows of other tokens than its trainable_token_indices: the "
            "adapter is damaged."
        )
