"""What a run will need, before any weight is loaded.

What stays is added up from the rules of the rooms that own it; what a training step needs on top
is read from the step itself, run under fake tensors. Phases that are not training (load, select,
refresh, export) have rules too. Everything is in bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from leanlift.config import LiftConfig
from leanlift.errors import UserError
from leanlift.export import merge_nbytes
from leanlift.layer import FrozenLinear
from leanlift.memory.fake import Loss, attach_fake, fake_tensors, forward_peak, step_peak
from leanlift.memory.measure import CATEGORIES
from leanlift.memory.pieces import FirstPiecesScratch
from leanlift.model.ends import INT8
from leanlift.optim import TABLES_NBYTES, adamw_nbytes
from leanlift.quantized import WeightFormat, dtype_of
from leanlift.selection import selection_nbytes
from leanlift.sparse import index_nbytes, retired_nbytes

CARDS_GIB = (6, 8, 12, 16, 24, 48)
CONTEXT = int(0.55 * 2**30)
"""What a CUDA process takes before its first tensor, and what the allocator loses to
fragmentation: an allowance, from reports of 0.5 to 0.6 GiB."""

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
        dtype: name of the dtype of what is not quantized.
        checkpointing: whether activations are recomputed.
        accumulate: micro-batches per step.
        optim: a name that the Trainer knows, or one of ours.
        in_backward: whether each gradient is freed as soon as it exists.
        offload: whether saved activations are moved to the CPU.
        embedding_on_cpu: whether the embedding is not on the card.
        cuda: whether the run is on a GPU; torch's AdamW works on all vectors at once there.
        eval_batch: rows of a batch that is evaluated; 0: nothing is.

    Defaults are those of `leanlift train` on a GPU.
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


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by category (of the training step) and by phase.

    Attributes:
        model: what was planned for.
        categories: the training step's bytes by category; together its peak.
        phases: peak of each phase. "export" runs on the CPU; beside a model that is there too it
            counts that, and is no peak of a card.
        step: what the parts of a step, and a selection, have on top of what stays. The backward
            pass and the optimizer's step include gradients.
        entries: trained entries.
        context: allowance for the CUDA context, in no other figure.
        notes: what the plan takes for granted.
    """

    model: str
    categories: dict[str, int]
    phases: dict[str, int]
    step: dict[str, int]
    entries: int
    context: int = CONTEXT
    notes: list[str] = field(default_factory=list)

    @property
    def peak_phase(self) -> str:
        return max((name for name in self.phases if name != "export"), key=self.phases.__getitem__)

    @property
    def peak(self) -> int:
        """Tensors at the worst moment on the card."""
        return self.phases[self.peak_phase]

    @property
    def needed(self) -> int:
        """Peak and context together: what a card must have."""
        return self.peak + self.context

    def fits(self, gib: float) -> bool:
        """Whether a card of this size will do."""
        return self.needed <= gib * 2**30

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "peak": self.peak,
            "peak_phase": self.peak_phase,
            "needed": self.needed,
            "fits_gib": {str(card): self.fits(card) for card in CARDS_GIB},
        }


def plan_step(
    build: Callable[[], Any],
    name: str,
    config: LiftConfig,
    fmt: WeightFormat | None,
    settings: StepSettings,
    loss: Loss,
) -> MemoryPlan:
    """Plan a run without loading a weight.

    Args:
        build: makes the 16/32-bit model; called under fake tensors.
        name: of the model, for the report.
        config: what is trained.
        fmt: how the Linears are quantized; None: not at all.
        settings: the training step.
        loss: what the step computes.

    Raises:
        UserError: an optimizer whose state has no rule, or a model without targets.
    """
    with fake_tensors():
        model = build()
        ends, loaded, other = _unquantized(model, config.quantize_ends, settings)
        scratch = FirstPiecesScratch(always=_needs_scratch(fmt, settings))
        shapes = attach_fake(model, config, fmt, settings.embedding_on_cpu, scratch)
        linears = _linear_shapes(model)
        if settings.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        moving = step_peak(
            model,
            loss,
            settings.batch,
            settings.length,
            settings.in_backward,
            settings.accumulate > 1,
            settings.offload,
        )
        evaluating = 0
        if settings.eval_batch:
            model.eval()
            evaluating = forward_peak(model, loss, settings.eval_batch, settings.length)
    item = dtype_of(settings.dtype).itemsize
    counts = {target: config.count(shape, target) for target, shape in shapes.items()}
    entries, value = sum(counts.values()), 2 if config.values_dtype == "bfloat16" else 4
    held = {
        "base weights": sum(_weight_nbytes(shape, fmt, item) for shape in linears),
        "embeddings and head": ends,
        "norms and other": other,
        "index": sum(index_nbytes(shapes[t], count) for t, count in counts.items()),
        "values": value * entries,
        "retired entries": _retired(config, shapes, counts, value),
        "optimizer state": optimizer_nbytes(settings.optim, list(counts.values()), value),
        "scratch": item * max(m * n for m, n in linears) if scratch.always else 0,
    }
    gradients = 0 if settings.in_backward else value * entries
    static = sum(held.values())
    updating = gradients + update_nbytes(settings, list(counts.values()), value)
    train = static + max(moving.peak, updating)
    categories = {**held, "gradients": gradients}
    categories["activations and workspace"] = train - sum(categories.values())
    base, largest = held["base weights"] + loaded + other, max(m * n for m, n in linears)
    phases = {
        "load": base + LOADED_AT_ONCE * item * largest,
        "select": base + held["index"] + held["values"] + _selecting(config, shapes, counts, item),
        "train": train,
        "export": (0 if settings.cuda else static) + merge_nbytes(max(largest, loaded // item)),
    }
    if settings.eval_batch:
        phases["evaluate"] = static + evaluating
    if config.refresh_interval:
        exchange = REFRESH_PER_ENTRY * max(counts.values())
        phases["refresh"] = static + max(_selecting(config, shapes, counts, 4), exchange)
    return MemoryPlan(
        model=name,
        categories={category: categories[category] for category in CATEGORIES},
        phases=phases,
        step={
            "forward pass": moving.forward,
            "kept for the backward pass": moving.kept,
            "loss": moving.loss,
            "backward pass": moving.backward,
            "optimizer's step": updating,
            "one selection": _selecting(config, shapes, counts, item),
        },
        entries=entries,
        context=CONTEXT if settings.cuda else 0,
    )


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


def _unquantized(model: Any, quantize_ends: bool, settings: StepSettings) -> tuple[int, int, int]:
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
    held = [] if settings.embedding_on_cpu else [embedding.weight]
    held += [] if tied else [head.weight]
    bias = 0 if head is None or head.bias is None else head.bias.nbytes
    ends = sum(INT8.nbytes(tuple(w.shape)) if quantize_ends else w.nbytes for w in held) + bias
    counted = {id(embedding.weight), *({id(p) for p in head.parameters()} if head else ())}
    counted |= {id(m.weight) for m in model.modules() if type(m) is nn.Linear}
    rest = {
        id(tensor): tensor.nbytes
        for tensor in (*model.parameters(), *model.buffers())
        if id(tensor) not in counted
    }
    loaded = embedding.weight.nbytes + (0 if tied else head.weight.nbytes) + bias
    return ends, loaded, sum(rest.values())


def _linear_shapes(model: Any) -> list[tuple[int, int]]:
    return [m.weight_tiles.shape for m in model.modules() if isinstance(m, FrozenLinear)]


def _needs_scratch(fmt: WeightFormat | None, settings: StepSettings) -> bool:
    """Whether weights are patched in the scratch; see `FrozenLinear.effective_weight`."""
    fresh = fmt is not None and fmt.kind in ("nf4", "fp4") and fmt.dtype == settings.dtype
    return settings.cuda or not fresh


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


def _selecting(
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
