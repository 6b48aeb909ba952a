"""What is planned, and the shapes that a fake model of it has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from leanlift.config import LiftConfig
from leanlift.errors import UserError
from leanlift.layers import FrozenLinear, LiftEmbedding, LiftLinear, scratch_nbytes
from leanlift.layers.tokens import TOKEN_NBYTES
from leanlift.model.embeddings import (
    EmbeddingBytes,
    check_not_tied,
    embeddings_nbytes,
    quantizing_ends_nbytes,
)
from leanlift.model.stacks import named_parts
from leanlift.model.stream_state import check_used_once
from leanlift.model.streaming import layers_by_block
from leanlift.model.tiled import between_products
from leanlift.model.whole import whole_modules
from leanlift.plan.fake import attach_fake, fake_tensors
from leanlift.plan.model_work import model_work
from leanlift.plan.pieces import first_pieces
from leanlift.plan.settings import PlanSettings
from leanlift.plan.work import ModelWork
from leanlift.streaming import BUFFERS, nbytes_of
from leanlift.tiles import parts_of
from leanlift.weights.kinds import is_dense_linear, is_turned_linear, matrix_of
from leanlift.weights.quantized import WeightFormat, dtype_of
from leanlift.weights.stacks import ExpertStack, QuantizedStack, quantizing_nbytes


@dataclass(frozen=True)
class Planned:
    """What is planned, before a model is made of it.

    Attributes:
        build: makes the 16/32-bit model; called under fake tensors.
        config: what is trained.
        fmt: how the Linears are held.
        settings: of the run.
        skipped: names of what the checkpoint, which is quantized, says is not; None: nothing.
    """

    build: Callable[[], Any]
    config: LiftConfig
    fmt: WeightFormat
    settings: PlanSettings
    skipped: tuple[str, ...] | None = None

    @property
    def value_nbytes(self) -> int:
        """Of one trained offset."""
        return dtype_of(self.config.values_dtype).itemsize


@dataclass(frozen=True)
class BlockBytes:
    """Bytes of the blocks of a streamed base.

    Attributes:
        tensors: of all tensors that are streamed, wherever they are.
        host: of the host's buffers for them.
        buffers: of those on the device.
        targets: the names of the targets in each block.
        again: why what is learned cannot come along; None: it can.
    """

    tensors: int
    host: int
    buffers: int
    targets: tuple[tuple[str, ...], ...]
    again: str | None = None


@dataclass(frozen=True)
class Shapes:
    """What a fake model shows without a step.

    Attributes:
        ends: bytes of the embedding and the output head.
        quantizing: what it takes to hold them in INT8, where they will be.
        other: bytes of all else that is no weight of our layers.
        scratch: bytes of the buffer that these share.
        weights: of the model, in number.
        targets, counts: shapes of the targets, and how many entries of each are trained.
        parts: how many matrices a target is a stack of, of stacks.
        fixed: targets of which nothing is chosen.
        linears: shapes of all our layers.
        held: bytes of their weights.
        read_whole: entries of the largest matrix or stack that is whole before it is held so.
        by_tiles: bytes that the largest stack takes while it is quantized as it is read.
        streamed: the blocks of a base that is in the host's memory; None: it is not.
        turned: entries of the largest of them whose transpose a 16-bit checkpoint holds.
        work: what a step has to compute.
    """

    ends: EmbeddingBytes
    quantizing: int
    other: int
    scratch: int
    weights: int
    targets: dict[str, tuple[int, int]]
    counts: dict[str, int]
    parts: dict[str, int]
    fixed: frozenset[str]
    linears: list[tuple[int, int]]
    held: int
    read_whole: int
    by_tiles: int
    streamed: BlockBytes | None
    turned: int
    work: ModelWork

    @property
    def chosen(self) -> dict[str, tuple[int, int]]:
        """Shapes of the targets of which a selection chooses entries."""
        return {name: shape for name, shape in self.targets.items() if name not in self.fixed}

    @property
    def largest(self) -> int:
        """Entries of the largest Linear, or stack."""
        return max(m * n for m, n in self.linears)

    @property
    def entries(self) -> list[int]:
        """Trained entries of each target."""
        return list(self.counts.values())


def attached(planned: Planned) -> tuple[Shapes, Any]:
    """The fake model, ready for a step, and its shapes; call it under `fake_tensors`.

    Raises:
        UserError: a model without targets or MLPs that can be tiled, or an embedding that cannot be
            on the CPU.
    """
    config, settings, model = planned.config, planned.settings, planned.build()
    if settings.embedding_on_cpu:
        check_not_tied(model)
    weights = sum(p.numel() for p in model.parameters())
    elsewhere = settings.embedding_on_cpu and settings.on_cuda  # else it is where the model is
    whole = [model.get_submodule(name) for name in whole_modules(model, config)]
    head_is_target = model.get_output_embeddings() in whole
    ends = embeddings_nbytes(model, config.quantize_embeddings, elsewhere, head_is_target)
    quantizing = quantizing_ends_nbytes(model) if config.quantize_embeddings else 0
    dtype, head = settings.model_dtype, _shape_of_head(model)
    tensors = _tensors_outside_ends(model)
    turned = max((matrix_of(m).numel() for m in model.modules() if is_turned_linear(m)), default=0)
    own = {
        name: id(m.weight)
        for name, m in named_parts(model).items()
        if is_dense_linear(m) or isinstance(m, ExpertStack)
    }
    workspace = first_pieces(settings.device_type)
    workspace.reuses_weights = settings.reuse_weights
    given = settings.embedding_on_cpu, workspace, settings.stream_base, planned.skipped
    indices = attach_fake(model, config, planned.fmt, *given)
    fused = settings.fused_elementwise and settings.on_cuda
    tiled = between_products(model, settings.tiled_mlp, settings.mlp_tokens, fused)
    layers = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, FrozenLinear) and not isinstance(m, LiftEmbedding)
    }
    for name in layers:
        tensors.pop(own[name], None)
    streamed = _streamed(model) if settings.stream_base else None
    shapes = Shapes(
        ends=ends,
        quantizing=quantizing,
        other=sum(tensors.values()) + TOKEN_NBYTES * len(config.trainable_token_indices),
        scratch=scratch_nbytes(layers.values(), dtype),
        weights=weights,
        targets={name: index.shape for name, index in indices.items()},
        counts=_counts(indices),
        parts={n: parts_of(layers[n].weight_tiles) for n in indices if n in layers},
        fixed=frozenset((*whole_modules(model, config), *(n for n in indices if n not in layers))),
        linears=[layer.weight_tiles.shape for layer in layers.values()],
        held=sum(_held(layer.weight_tiles) for layer in layers.values()),
        read_whole=_read_whole(layers.values()),
        by_tiles=_by_tiles(layers.values()),
        streamed=streamed,
        turned=turned,
        work=model_work(model, head, layers, _counts(indices), dtype, tiled),
    )
    return shapes, model


def _counts(indices: dict[str, Any]) -> dict[str, int]:
    return {name: index.count for name, index in indices.items()}


def _streamed(model: Any) -> BlockBytes:
    """Of the blocks of a base that is streamed."""
    names = {module: name for name, module in named_parts(model).items()}
    tensors, blocks, targets = 0, [], []
    for layers in layers_by_block(model):
        trained = [layer for layer in layers if isinstance(layer, LiftLinear)]
        targets.append(tuple(names[layer] for layer in trained))
        weights: list[Any] = [layer.weight_tiles for layer in layers]
        sizes = [size for w in weights for size in w.format.tensor_sizes(w.shape)]
        tensors += sum(sizes)
        blocks.append(nbytes_of(sizes))
    buffers = BUFFERS * max(blocks)
    return BlockBytes(tensors, sum(blocks), buffers, tuple(targets), _used_again(model))


def _used_again(model: Any) -> str | None:
    try:
        check_used_once(model)
    except UserError as error:
        return str(error)
    return None


def _held(weight: Any) -> int:
    nbytes: int = weight.format.held_nbytes(weight.shape)
    return nbytes


def _read_whole(layers: Iterable[FrozenLinear]) -> int:
    """Entries of the largest weight that is whole before it is held as it will be."""
    weights = [layer.weight_tiles for layer in layers]
    shapes = [w.shape for w in weights if not isinstance(w, QuantizedStack)]
    return max((m * n for m, n in shapes), default=0)


def _by_tiles(layers: Iterable[FrozenLinear]) -> int:
    """What the largest stack of experts takes while it is quantized, as it is read."""
    weights = [layer.weight_tiles for layer in layers]
    stacks = [w for w in weights if isinstance(w, QuantizedStack)]
    return max((quantizing_nbytes(w.shape, w.format) for w in stacks), default=0)


def _tensors_outside_ends(model: Any) -> dict[int, int]:
    """Bytes of a stock model's tensors but those of its embedding and head, by identity."""
    ends = (model.get_input_embeddings().weight, *_parameters(model.get_output_embeddings()))
    counted = {id(tensor) for tensor in ends}
    tensors = (*model.parameters(), *model.buffers())
    return {id(tensor): tensor.nbytes for tensor in tensors if id(tensor) not in counted}


def _shape_of_head(model: Any) -> tuple[int, int]:
    """Vocabulary and width; nothing where there is no head."""
    found = [p.shape for p in _parameters(model.get_output_embeddings()) if p.dim() == 2]
    return (found[0][0], found[0][1]) if found else (0, 0)


def _parameters(module: nn.Module | None) -> list[nn.Parameter]:
    return [] if module is None else list(module.parameters())


def shapes_of(planned: Planned) -> Shapes:
    """The targets and other shapes of a model, without a step."""
    with fake_tensors():
        return attached(planned)[0]
