"""Giving a model's embedding and output head more rows, for tokens that the base does not have.

What is in the rows says `leanlift.weights.grown`. The modules stay, and with them their kind,
their device and whatever hangs on them; only their tensors are replaced. An embedding
and a head that share one tensor go on sharing it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from leanlift.errors import UserError
from leanlift.tiles import DenseTiles
from leanlift.weights.grown import check_growth, new_rows


def embedding_size(model: Any) -> int:
    """Rows of the embedding, whatever holds it."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 2:
        return int(weight.shape[0])
    return int(model.config.get_text_config().vocab_size)


def head_name(model: Any) -> str:
    """The path of the output head; "" where there is none."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return next((n for n, m in model.named_modules() if m is head), "") if head else ""


def rows_to_grow_to(model: Any, rows: int | None) -> int | None:
    """`rows` where the embedding has fewer and can have as many; None where it has enough.

    Raises:
        UserError: no number of rows, too many, or an embedding or head that cannot grow.
    """
    if rows is None:
        return None
    if type(rows) is not int or rows < 1:
        raise UserError(f"expected embedding_rows as a number of rows, got {rows!r:.80}.")
    have = embedding_size(model)
    if rows <= have:
        return None
    check_growth(rows, have, "embedding_rows")
    _check_embeddings(model, have)
    return rows


def grow_embedding(model: Any, rows: int) -> None:
    """Give the embedding and the head of a model, stock or attached, `rows` rows, in place.

    Raises:
        UserError: as for `rows_to_grow_to`. The model is unchanged then.
    """
    if rows_to_grow_to(model, rows) is not None:
        _resize(model, rows)


@contextmanager
def with_more_rows(model: Any, rows: int | None) -> Iterator[None]:
    """A model with a larger embedding for a while; None: as it is."""
    have = embedding_size(model)
    if rows_to_grow_to(model, rows) is None:
        yield
        return
    assert rows is not None
    _resize(model, rows)
    try:
        yield
    finally:
        _resize(model, have)


def _check_embeddings(model: Any, have: int) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    kinds = isinstance(embedding, nn.Embedding) and type(head) is nn.Linear
    if not kinds or head.out_features != have:
        raise UserError(
            f"the embedding of this {type(model).__name__} cannot get rows for more tokens: "
            f"expected an Embedding and a Linear with {have} rows each, got {_kind(embedding)} and "
            f"{_kind(head)}. Where leanlift has replaced them, load the base again."
        )
    ends = {id(embedding.weight), id(head.weight), id(head.bias)} - {id(None)}
    for name, module in model.named_modules():
        if module is embedding or module is head:
            continue
        shares = any(id(held) in ends for held in module.parameters(recurse=False))
        if shares or (isinstance(module, nn.Embedding) and module.num_embeddings == have):
            raise UserError(
                f"the embedding of this {type(model).__name__} cannot get rows for more tokens: "
                f"{name} has a row for each token too. Use tokens that the base has."
            )


def _kind(module: Any) -> str:
    weight = getattr(module, "weight", None)
    size = tuple(weight.shape) if isinstance(weight, Tensor) else "no weight"
    return f"{type(module).__name__} {size}"


@torch.no_grad()
def _resize(model: Any, rows: int) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    have, tied = embedding.weight.shape[0], head.weight is embedding.weight
    embedding.weight = _resized(embedding.weight, rows)
    head.weight = embedding.weight if tied else _resized(head.weight, rows)
    if head.bias is not None:
        head.bias = _resized(head.bias, rows)
    embedding.num_embeddings = head.out_features = rows
    text = model.config.get_text_config()
    for holder in (text, model.config, *model.modules()):
        if holder is text or getattr(holder, "vocab_size", None) == have:
            holder.vocab_size = rows


def _resized(held: nn.Parameter, rows: int) -> nn.Parameter:
    """The first rows of a parameter [m, n] or [m]; or all, and new ones."""
    have, tensor = held.shape[0], held.detach()
    if rows > have:
        matrix = tensor if tensor.dim() == 2 else tensor[:, None]
        more = new_rows(DenseTiles(matrix), rows, tensor.dtype)
        tensor = torch.cat([tensor, more.reshape(-1, *tensor.shape[1:])])
    return nn.Parameter(tensor[:rows], requires_grad=held.requires_grad)
