"""What a run will need, before any weight is loaded.

What stays is added up from the rules of the rooms that own it; what a training step needs on top
is read from the step itself, run under fake tensors. Phases that are not training (load, select,
refresh, export) have rules too. Everything is in bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

from leanlift.config import LiftConfig
from leanlift.export import merge_nbytes
from leanlift.measure.meter import CATEGORIES
from leanlift.plan.fake import StepBytes, attach_fake, fake_tensors, forward_peak, step_peak
from leanlift.plan.pieces import first_pieces
from leanlift.plan.rules import (
    Shapes,
    StepSettings,
    before_training,
    held_nbytes,
    linear_shapes,
    needs_scratch,
    refresh_nbytes,
    selecting_nbytes,
    unquantized_nbytes,
    update_nbytes,
    value_nbytes,
)
from leanlift.weights.quantized import WeightFormat, dtype_of

CARDS_GIB = (6, 8, 12, 16, 24, 48)
CONTEXT = int(0.55 * 2**30)
"""What a CUDA process takes before its first tensor, and what the allocator loses to
fragmentation: an allowance, from reports of 0.5 to 0.6 GiB."""

MOMENTS = {
    "forward pass": "in the forward pass",
    "loss": "in the loss over the vocabulary",
    "backward pass": "in the backward pass",
    "optimizer's step": "in the optimizer's step",
    "load": "while the base is loaded",
    "select": "while the trained entries are selected",
    "refresh": "while a refresh selects anew",
    "evaluate": "in an evaluation",
    "export": "in the merge",
}
"""The moments at which memory can peak: parts of a step and other phases, in words."""


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
        weights: weights of the base.
        holds_for: the settings that were planned for, by name.
        context: allowance for the CUDA context, in no other figure.
        notes: what the plan takes for granted.
    """

    model: str
    categories: dict[str, int]
    phases: dict[str, int]
    step: dict[str, int]
    entries: int
    weights: int = 0
    holds_for: dict[str, Any] = field(default_factory=dict)
    context: int = CONTEXT
    notes: list[str] = field(default_factory=list)

    @property
    def peak_phase(self) -> str:
        """The phase on the card that takes most."""
        return max((name for name in self.phases if name != "export"), key=self.phases.__getitem__)

    @property
    def peak_moment(self) -> str:
        """The phase of the peak, or the part of the training step: a key of `MOMENTS`."""
        if self.peak_phase != "train":
            return self.peak_phase
        return self.step_moment

    @property
    def step_moment(self) -> str:
        """The part of the training step in which it peaks."""
        parts = ("backward pass", "loss", "forward pass", "optimizer's step")
        return max(parts, key=self.step.__getitem__)

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
        """A JSON-ready dictionary (`docs/plan.md`)."""
        return {
            **asdict(self),
            "peak": self.peak,
            "peak_phase": self.peak_phase,
            "peak_moment": self.peak_moment,
            "step_moment": self.step_moment,
            "needed": self.needed,
            "fits_gib": {str(card): self.fits(card) for card in CARDS_GIB},
        }


Known = dict[tuple[str, ...], Any]
"""What fake steps of one model and loss have shown, by all that decides it."""


def plan_step(
    build: Callable[[], Any],
    name: str,
    config: LiftConfig,
    fmt: WeightFormat | None,
    settings: StepSettings,
    loss: Callable[..., Tensor],
    known: Known | None = None,
) -> MemoryPlan:
    """Plan a run without loading a weight.

    Args:
        build: makes the 16/32-bit model; called under fake tensors.
        name: of the model, for the report.
        config: what is trained.
        fmt: how the Linears are quantized; None: not at all.
        settings: the training step.
        loss: what the step computes: `fake.Loss` that also takes how many tokens are
            `trained`, and whether rows are `padded`.
        known: of earlier plans for this model and loss, which are run once; added to.

    Raises:
        UserError: an optimizer whose state has no rule, or a model without targets.
    """
    known = {} if known is None else known
    shapes, moving = _training(build, config, fmt, settings, loss, known)
    evaluating = _evaluating(build, config, fmt, settings, loss, known)
    held = held_nbytes(config, fmt, settings, shapes)
    counts, value = shapes.counts, value_nbytes(config)
    item = dtype_of(settings.dtype).itemsize
    gradients = 0 if settings.in_backward else held["values"]
    static = sum(held.values())
    updating = gradients + update_nbytes(settings, list(counts.values()), value)
    train = static + max(moving.peak, updating)
    categories = {**held, "gradients": gradients}
    categories["activations and workspace"] = train - sum(categories.values())
    phases = {
        **before_training(config, settings, shapes, held),
        "train": train,
        **_beside_training(config, settings, shapes, static, evaluating),
    }
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
            "one selection": selecting_nbytes(config, shapes.targets, counts, item),
        },
        entries=sum(counts.values()),
        weights=shapes.weights,
        holds_for=_holds_for(config, fmt, settings),
        context=CONTEXT if settings.cuda else 0,
    )


def _beside_training(
    config: LiftConfig, settings: StepSettings, shapes: Shapes, static: int, evaluating: int
) -> dict[str, int]:
    """Peaks of an export, and of the evaluations and refreshes of a run that has them, in which
    `static` bytes stay."""
    largest = max(m * n for m, n in shapes.linears)
    unquantized = shapes.loaded // dtype_of(settings.dtype).itemsize
    phases = {"export": (0 if settings.cuda else static) + merge_nbytes(max(largest, unquantized))}
    if settings.eval_batch:
        phases["evaluate"] = static + evaluating
    if config.refresh_interval:
        phases["refresh"] = static + refresh_nbytes(config, shapes)
    return phases


def least_nbytes(
    build: Callable[[], Any], config: LiftConfig, fmt: WeightFormat | None, settings: StepSettings
) -> tuple[int, str]:
    """What a run needs at the very least, the CUDA context included and activations left out, and
    at which moment. Known from shapes alone; no plan of these settings says less.

    Args:
        build, config, fmt, settings: as `plan_step` has them.
    """
    shapes = shapes_of(build, config, fmt, settings)
    held, counts = held_nbytes(config, fmt, settings, shapes), shapes.counts
    gradients = 0 if settings.in_backward else held["values"]
    updating = update_nbytes(settings, list(counts.values()), value_nbytes(config))
    phases = before_training(config, settings, shapes, held)
    phases["optimizer's step"] = sum(held.values()) + gradients + updating
    moment = max(phases, key=phases.__getitem__)
    return phases[moment] + (CONTEXT if settings.cuda else 0), moment


def shapes_of(
    build: Callable[[], Any], config: LiftConfig, fmt: WeightFormat | None, settings: StepSettings
) -> Shapes:
    """The targets and other shapes of a model, without a step; the arguments are `plan_step`'s."""
    with fake_tensors():
        return _attached(build, config, fmt, settings)[0]


def _attached(
    build: Callable[[], Any], config: LiftConfig, fmt: WeightFormat | None, settings: StepSettings
) -> tuple[Shapes, Any]:
    """The fake model, ready for a step, and its shapes."""
    model = build()
    weights = sum(p.numel() for p in model.parameters())
    ends, loaded, other = unquantized_nbytes(model, config.quantize_embeddings, settings)
    workspace = first_pieces(always=needs_scratch(fmt, settings))
    indices = attach_fake(model, config, fmt, settings.embedding_on_cpu, workspace)
    targets = {name: index.shape for name, index in indices.items()}
    counts = {name: index.count for name, index in indices.items()}
    return Shapes(ends, loaded, other, weights, targets, linear_shapes(model), counts), model


def _training(
    build: Callable[[], Any],
    config: LiftConfig,
    fmt: WeightFormat | None,
    settings: StepSettings,
    loss: Callable[..., Tensor],
    known: Known,
) -> tuple[Shapes, StepBytes]:
    """A model's shapes and the bytes of its step, which is run where it is not known."""
    key = ("train", *_what_decides(config, fmt, settings))
    if key not in known:
        with fake_tensors():
            shapes, model = _attached(build, config, fmt, settings)
            if settings.checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            moving = step_peak(
                model.train(),
                partial(loss, trained=settings.trained, padded=settings.padded),
                settings.batch,
                settings.length,
                settings.in_backward,
                settings.accumulate > 1,
                settings.offload,
            )
        known[key] = shapes, moving
    found: tuple[Shapes, StepBytes] = known[key]
    return found


def _evaluating(
    build: Callable[[], Any],
    config: LiftConfig,
    fmt: WeightFormat | None,
    settings: StepSettings,
    loss: Callable[..., Tensor],
    known: Known,
) -> int:
    """Bytes of an evaluation beyond what stays; 0 where there is none."""
    if not settings.eval_batch:
        return 0
    length, trained = settings.eval_length or settings.length, settings.eval_trained
    padded = settings.eval_padded
    same = replace(settings, batch=settings.eval_batch, length=length, trained=trained)
    same = replace(same, padded=padded)
    key = ("evaluate", *_what_decides(config, fmt, same))
    if key not in known:
        with fake_tensors():
            _, model = _attached(build, config, fmt, settings)
            counted = partial(loss, trained=trained, padded=padded)
            known[key] = forward_peak(model.eval(), counted, settings.eval_batch, length)
    return int(known[key])


def _what_decides(
    config: LiftConfig, fmt: WeightFormat | None, settings: StepSettings
) -> tuple[str, ...]:
    """All that a step's bytes depend on: not on the optimizer, nor on how entries are chosen."""
    plain = LiftConfig()
    free = ("approx_rank", "refresh_interval", "refresh_margin", "retired_limit", "selector")
    alike = replace(config, **{name: getattr(plain, name) for name in free}, block=1)
    step = replace(
        settings,
        optim="",
        accumulate=min(2, settings.accumulate),
        eval_batch=0,
        eval_length=None,
        eval_trained=None,
        eval_padded=False,
    )
    return repr(alike), repr(fmt), repr(step), str(config.block)


def _holds_for(
    config: LiftConfig, fmt: WeightFormat | None, settings: StepSettings
) -> dict[str, Any]:
    """The settings that a plan holds for, JSON-ready."""
    return {
        "rows": settings.batch,
        "tokens": settings.length,
        "trained_tokens": settings.trained,
        "padded": settings.padded,
        "accumulation": settings.accumulate,
        "base": "as stored" if fmt is None else fmt.kind,
        "double_quantization": fmt is not None and fmt.double,
        "dtype": settings.dtype,
        "values_dtype": config.values_dtype,
        "optimizer": settings.optim,
        "checkpointing": settings.checkpointing,
        "offloading": settings.offload,
        "in_backward": settings.in_backward,
        "quantize_embeddings": config.quantize_embeddings,
        "embedding_on_cpu": settings.embedding_on_cpu,
        "refresh_interval": config.refresh_interval,
        "evaluation_rows": settings.eval_batch,
        "cuda": settings.cuda,
    }
