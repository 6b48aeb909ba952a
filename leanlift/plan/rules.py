"""What a run holds, added up from the rules of the rooms that own it: bytes from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from leanlift.config import LiftConfig
from leanlift.errors import UserError
from leanlift.layers import FrozenLinear, patched_where_made
from leanlift.model.embeddings import INT8
from leanlift.optim import TABLES_NBYTES, adamw_nbytes
from leanlift.selection import selection_nbytes
from leanlift.sparse import index_nbytes, retired_nbytes
from leanlift.weights.quantized import WeightFormat, dtype_of

TABLES_4BIT, TABLES_DOUBLE = 64, 1088
LOADED_AT_ONCE = 4
"""Unquantized matrices that transformers' loader holds beside what it has quantized already."""

REFRESH_PER_ENTRY = 64
"""Bytes per entry of the largest matrix while its mask is exchanged: sorted int64 positions of
both masks and the store, where each entry was, and both moments before and after."""

CHUNK_TEMPORARIES = 9 * 4 * 2**18


@dataclass(frozen=True)
class StepSettings:
    """What decides the memory of a training step, besides model and LiftConfig.

    Attributes:
        batch, length: rows and tokens of a micro-batch.
        trained: tokens of a micro-batch that are trained; None: all.
        dtype: name of the dtype of what is not quantized.
        checkpointing: whether activations are recomputed.
        accumulate: micro-batches per step.
        optim: a name that the Trainer knows, or one of ours.
        in_backward: whether each gradient is freed as soon as it exists.
        offload: whether saved activations are moved to the CPU.
        embedding_on_cpu: whether the embedding is not on the card.
        cuda: whether the run is on a GPU; torch's AdamW works on all vectors at once there.
        eval_batch: rows of a batch that is evaluated; 0: nothing is.
        eval_length, eval_trained: its tokens, and those that count; None: as in training, all.
        padded, eval_padded: whether rows of a batch are padded, which takes a mask.

    Defaults are those of `LiftSFTConfig` on a GPU.
    """

    batch: int = 8
    length: int = 1024
    dtype: str = "bfloat16"
    checkpointing: bool = True
    accumulate: int = 1
    optim: str = "adamw_torch"
    in_backward: bool = False
    offload: bool = False
    embedding_on_cpu: bool = False
    cuda: bool = True
    eval_batch: int = 0
    trained: int | None = None
    eval_length: int | None = None
    eval_trained: int | None = None
    padded: bool = False
    eval_padded: bool = False


@dataclass(frozen=True)
class Shapes:
    """What a fake model shows without a step: bytes of the ends as they are held and as they are
    loaded, of all else that is no Linear's weight, weights in all, the shapes of the targets and of
    all Linears, and how many entries of each target are trained."""

    ends: int
    loaded: int
    other: int
    weights: int
    targets: dict[str, tuple[int, int]]
    linears: list[tuple[int, int]]
    counts: dict[str, int]


def value_nbytes(config: LiftConfig) -> int:
    """Bytes of one trained value."""
    return 2 if config.values_dtype == "bfloat16" else 4


def held_nbytes(
    config: LiftConfig, fmt: WeightFormat | None, settings: StepSettings, shapes: Shapes
) -> dict[str, int]:
    """What stays from step to step, by category."""
    item, value = dtype_of(settings.dtype).itemsize, value_nbytes(config)
    counts, targets = shapes.counts, shapes.targets
    largest = max(m * n for m, n in shapes.linears)
    return {
        "base weights": sum(_weight_nbytes(shape, fmt, item) for shape in shapes.linears),
        "embeddings and head": shapes.ends,
        "norms and other": shapes.other,
        "index": sum(index_nbytes(targets[t], count) for t, count in counts.items()),
        "values": value * sum(counts.values()),
        "retired entries": _retired(config, targets, counts, value),
        "optimizer state": optimizer_nbytes(settings.optim, list(counts.values()), value),
        "scratch": item * largest if needs_scratch(fmt, settings) else 0,
    }


def before_training(
    config: LiftConfig, settings: StepSettings, shapes: Shapes, held: dict[str, int]
) -> dict[str, int]:
    """Peaks of loading and of the first selection."""
    item, largest = dtype_of(settings.dtype).itemsize, max(m * n for m, n in shapes.linears)
    base = held["base weights"] + shapes.loaded + shapes.other
    selecting = selecting_nbytes(config, shapes.targets, shapes.counts, item)
    return {
        "load": base + LOADED_AT_ONCE * item * largest,
        "select": base + held["index"] + held["values"] + selecting,
    }


def optimizer_nbytes(optim: str, counts: list[int], value: int) -> int:
    """State of an optimizer over vectors of these lengths, from its name alone.

    Raises:
        UserError: there is no rule for it.
    """
    if optim in ("adamw_torch", "adamw_torch_fused"):
        return sum(4 + 2 * value * count for count in counts)
    if optim == "sparse_adamw":
        return sum(adamw_nbytes(count) for count in counts)
    if optim == "sparse_adamw_8bit":
        return sum(adamw_nbytes(count, "8bit") for count in counts) + TABLES_NBYTES
    if optim in ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"):
        # bitsandbytes keeps fp32 state where a vector has fewer than 4096 entries
        state = [8 * c if c < 4096 else 2 * (c + 4 * -(-c // 256)) for c in counts]
        return sum(state) + (TABLES_NBYTES if max(counts) >= 4096 else 0)
    if optim == "paged_adamw_32bit":
        return sum(8 * count for count in counts)
    raise UserError(
        f"the memory of optim={optim} cannot be planned: expected adamw_torch, adamw_8bit, "
        "paged_adamw_8bit, sparse_adamw or sparse_adamw_8bit."
    )


def update_nbytes(settings: StepSettings, counts: list[int], value: int) -> int:
    """Temporaries of the optimizer's step."""
    if settings.optim.startswith("sparse_adamw"):
        return min(CHUNK_TEMPORARIES, 9 * 4 * max(counts))
    if settings.optim == "adamw_torch":
        return value * sum(counts) if settings.cuda else 2 * value * max(counts)
    return 0


def _weight_nbytes(shape: tuple[int, int], fmt: WeightFormat | None, item: int) -> int:
    if fmt is None:
        return item * shape[0] * shape[1]
    tables = 0 if fmt.kind == "int8" else TABLES_DOUBLE if fmt.double else TABLES_4BIT
    return fmt.nbytes(shape) + tables


def unquantized_nbytes(
    model: Any, quantize_embeddings: bool, settings: StepSettings
) -> tuple[int, int, int]:
    """Of a 16/32-bit model: bytes of the embedding and head as they will be held in training, as
    they are loaded, and bytes of everything else that is no weight of a Linear.

    Raises:
        UserError: an embedding on the CPU that is tied to the head.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or embedding.weight is head.weight
    if tied and settings.embedding_on_cpu:
        raise UserError(
            "the embedding is tied to the output head, which the GPU needs: leave out "
            "embedding_on_cpu for this model."
        )
    away = settings.embedding_on_cpu and settings.cuda  # in a run on the CPU it is there as well
    held = [] if away else [embedding.weight]
    held += [] if tied else [head.weight]
    bias = 0 if head is None or head.bias is None else head.bias.nbytes
    ends = (
        sum(INT8.nbytes(tuple(w.shape)) if quantize_embeddings else w.nbytes for w in held) + bias
    )
    counted = {id(embedding.weight), *({id(p) for p in head.parameters()} if head else ())}
    counted |= {id(m.weight) for m in model.modules() if type(m) is nn.Linear}
    rest = {
        id(tensor): tensor.nbytes
        for tensor in (*model.parameters(), *model.buffers())
        if id(tensor) not in counted
    }
    loaded = embedding.weight.nbytes + (0 if tied else head.weight.nbytes) + bias
    return ends, loaded, sum(rest.values())


def linear_shapes(model: Any) -> list[tuple[int, int]]:
    """Shapes (m, n) of the Linears that leanlift computes, trained or not."""
    return [m.weight_tiles.shape for m in model.modules() if isinstance(m, FrozenLinear)]


def needs_scratch(fmt: WeightFormat | None, settings: StepSettings) -> bool:
    """Whether weights are patched in the scratch; the layers decide."""
    dtype, device_type = dtype_of(settings.dtype), "cuda" if settings.cuda else "cpu"
    if fmt is None:
        return True
    return not patched_where_made(fmt.fresh, fmt.torch_dtype, dtype, device_type)


def _retired(
    config: LiftConfig, shapes: dict[str, tuple[int, int]], counts: dict[str, int], value: int
) -> int:
    """The retired stores when they are full; without a bound, as large as the mask itself."""
    if not config.refresh_interval:
        return 0
    bounds = {name: config.retired_bound(count) for name, count in counts.items()}
    return sum(
        retired_nbytes(shapes[name], counts[name] if bound is None else bound, value)
        for name, bound in bounds.items()
    )


def selecting_nbytes(
    config: LiftConfig, shapes: dict[str, tuple[int, int]], counts: dict[str, int], item: int
) -> int:
    """Peak of the largest selection; a gradient mask's calibration is not planned."""
    if config.selector == "gradient":
        return 0
    scorer = config.scorer()
    return max(
        selection_nbytes(scorer, shape, counts[name], config.selection_tile_bytes, item)
        for name, shape in shapes.items()
    )


def refresh_nbytes(config: LiftConfig, shapes: Shapes) -> int:
    """Peak of a refresh beyond what stays: a selection from fp32 rows, or exchanging the mask."""
    counts = shapes.counts
    exchange = REFRESH_PER_ENTRY * max(counts.values())
    return max(selecting_nbytes(config, shapes.targets, counts, 4), exchange)
