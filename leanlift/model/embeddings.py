"""Replacing a model's embedding and output head by frozen ones of ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from leanlift.errors import UserError
from leanlift.layers.embedding import FrozenEmbedding
from leanlift.layers.frozen import FrozenLinear
from leanlift.layers.frozen_head import FrozenHead
from leanlift.layers.lm_head import Head
from leanlift.layers.tokens import LiftEmbedding, TiedHead
from leanlift.weights.places import weight_tensors
from leanlift.weights.quantized import (
    Weight8bit,
    WeightFormat,
    embedding_rows,
    frozen_weight,
    is_quantized,
    quantizing_int8_nbytes,
    requantize,
)

INT8 = WeightFormat("int8", "float32")

Hold = Callable[[Tensor], Weight8bit]
"""How a 16/32-bit matrix [V, d] is held in INT8: `int8`, or for a plan without its numbers."""


def int8(weight: Tensor, device: torch.device | None = None) -> Weight8bit:
    """A matrix quantized to INT8, one scale per row, on a device: its own if none is given."""
    tiles = requantize(weight.detach(), INT8, device or weight.device)
    assert isinstance(tiles, Weight8bit)
    return tiles


def quantize_embeddings(model: Any, hold: Hold = int8) -> dict[str, WeightFormat]:
    """Hold the embedding and the output head in INT8, one scale per row; tied ones once.

    Args:
        model: with a stock embedding and head.
        hold: makes the INT8 form of each.

    Returns:
        The formats of both by module name, for the fingerprint.

    Raises:
        UserError: the model has no stock embedding and head. It is unchanged then.
    """
    embedding, head = check_embeddings(model)
    dtype, scale = embedding.weight.dtype, embed_scale(embedding)
    names = {id(module): name for name, module in model.named_modules()}
    first, last = names[id(embedding)], names[id(head)]
    tied = head.weight is embedding.weight
    held = hold(embedding.weight)
    lookup = FrozenEmbedding(held.module, embedding_rows, dtype, False, scale, held)
    model.set_submodule(first, lookup)
    del embedding  # and its numbers, before the head has two forms
    base = held if tied else hold(head.weight)
    bias = None if head.bias is None else head.bias.data.to(base.device)
    model.set_submodule(last, FrozenHead(base.module, base, bias, dtype))
    return {first: INT8, last: INT8}


def ends_that_wait(model: Any, in_int8: bool, embedding_on_cpu: bool) -> list[nn.Module]:
    """Of a stock model on the host, the embedding and the head that need not be on the device
    before they have the form that they are trained with, where nothing goes through it before.

    Args:
        model: loaded.
        in_int8: whether both will be held in INT8.
        embedding_on_cpu: whether the embedding will be on the CPU.
    """
    if in_int8:
        return [*check_embeddings(model)]
    return [model.get_input_embeddings()] if embedding_on_cpu else []


def quantizing_ends_nbytes(model: Any) -> int:
    """What `quantize_embeddings` takes beside the 16/32-bit embedding and head: they go one by one.
    Of a model before anything is done to them, real or fake."""
    shape = tuple(model.get_input_embeddings().weight.shape)
    return INT8.held_nbytes(shape) + quantizing_int8_nbytes(shape)


def embedding_to_cpu(model: Any) -> None:
    """Keep the embedding in the CPU's memory; rows are looked up there and moved.

    Raises:
        UserError: it is tied to the head, which the GPU needs.
    """
    check_not_tied(model)
    embedding = model.get_input_embeddings()
    if isinstance(embedding, LiftEmbedding):
        raise UserError(
            "tokens of the embedding are trained, so it is not kept on the CPU: leave out "
            "embedding_on_cpu, or trainable_token_indices."
        )
    name = next(name for name, module in model.named_modules() if module is embedding)
    held: nn.Module = embedding.storage if isinstance(embedding, FrozenEmbedding) else embedding
    dtype = embedding.dtype if isinstance(embedding, FrozenEmbedding) else embedding.weight.dtype
    scale = embed_scale(embedding)
    if any(tensor.device.type != "cpu" for tensor in (*held.parameters(), *held.buffers())):
        held.cpu()
    if is_quantized(held):
        weight_tensors(held)  # reading them once brings the scales along, and frees the old ones
    model.set_submodule(name, FrozenEmbedding(held, embedding_rows, dtype, True, scale))


def check_not_tied(model: Any) -> None:
    """Refuse to keep an embedding on the CPU that is tied to the head.

    Raises:
        UserError: it is.
    """
    if embeddings_tied(model):
        raise UserError(
            "the embedding is tied to the output head, which the GPU needs: leave out "
            "embedding_on_cpu for this model."
        )


def embeddings_tied(model: Any) -> bool:
    """Whether the embedding and the output head are one tensor."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return head is not None and _storage(_held(embedding)) == _storage(_held(head))


def _held(module: Any) -> Tensor:
    """The weight of an embedding or a head as it is held, under whatever is around it."""
    while isinstance(module, TiedHead | FrozenHead):
        module = module.frozen if isinstance(module, TiedHead) else module.base
    weight: Tensor = module.weight
    return weight


@dataclass(frozen=True)
class EmbeddingBytes:
    """Bytes of a model's embedding and output head.

    Attributes:
        loaded: in 16 or 32 bits.
        held: where the model is, as they are held in training.
        in_int8: both in INT8, wherever they are then.
    """

    loaded: int
    held: int
    in_int8: int


def embeddings_nbytes(
    model: Any, in_int8: bool, elsewhere: bool, head_is_target: bool = False
) -> EmbeddingBytes:
    """Of a 16/32-bit model, before anything is done to its embedding and head.

    Args:
        model: with its own embedding and head, real or fake.
        in_int8: whether both will be held in INT8; tied ones once.
        elsewhere: whether the embedding will be on the CPU and the model is not.
        head_is_target: whether the head is trained, and counted among what is.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head_is_target:
        head = None
    own_head = [] if head is None or embeddings_tied(model) else [head.weight]
    bias = 0 if head is None or head.bias is None else head.bias.nbytes
    kept = own_head if elsewhere else [embedding.weight, *own_head]
    held = sum(INT8.held_nbytes(tuple(w.shape)) if in_int8 else w.nbytes for w in kept)
    loaded = sum(weight.nbytes for weight in (embedding.weight, *own_head))
    both = sum(INT8.held_nbytes(tuple(w.shape)) for w in (embedding.weight, *own_head))
    return EmbeddingBytes(loaded + bias, held + bias, both + bias)


def _storage(tensor: Tensor) -> int:
    """What tells storages apart, those of fake tensors too."""
    return int(tensor.data.untyped_storage()._cdata)


def output_head(model: Any) -> Head | None:
    """A model's output head as it holds it, without what else the model does to its logits; None
    where it is another module than a Linear."""
    module = model.get_output_embeddings()
    if isinstance(module, FrozenHead):
        bias: Any = module.bias
        return Head(module.weight_tiles, bias, stands_for=module.stands_for)
    if type(module) is nn.Linear:
        weight = frozen_weight(module, "the output head")
        return Head(weight, module.bias, stands_for=_stands_for(model))
    return None


def _stands_for(model: Any) -> str | None:
    """The kind of device that the layers of a model are taken to be on; None: where they are."""
    layers = (module for module in model.modules() if isinstance(module, FrozenLinear))
    return next((layer.workspace.stands_for for layer in layers), None)


def check_embeddings(model: Any) -> tuple[nn.Embedding, nn.Linear]:
    """The embedding and the output head, if they are of the kind that can be quantized.

    Raises:
        UserError: they are not.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or type(head) is not nn.Linear:
        raise UserError(
            f"embedding and head of this {type(model).__name__} are a {type(embedding).__name__} "
            f"and a {type(head).__name__}; quantize_embeddings expects a plain Embedding and a "
            "Linear."
        )
    embed_scale(embedding)
    return embedding, head


def embed_scale(embedding: nn.Module) -> Tensor | None:
    """The scalar that Gemma's embeddings multiply their rows by, or None.

    Raises:
        UserError: an embedding that does more than a stock one in a way that is not known here.
    """
    scale = getattr(embedding, "embed_scale", None)
    known = type(embedding) is nn.Embedding or isinstance(embedding, FrozenEmbedding)
    if not known and not isinstance(scale, Tensor):
        raise UserError(
            f"the embedding is a {type(embedding).__name__}, which leanlift cannot replace: leave "
            "out quantize_embeddings and embedding_on_cpu for this model."
        )
    return scale
