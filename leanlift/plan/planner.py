"""Planning a run: what stays, the step that is run, and the phases around it, put together.

What stays is added up from the rules of the rooms that own it (`sums`); what a training step needs
on top is read from the step itself, run under fake tensors (`fake`). Everything is in bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from leanlift.config import LiftConfig
from leanlift.errors import UserError, first_line
from leanlift.layers.lm_head import Finish
from leanlift.measure.meter import CATEGORIES
from leanlift.model.base import check_checkpointing, without_input_gradients
from leanlift.model.kept_blocks import keep_last_blocks
from leanlift.plan.batch import Batch
from leanlift.plan.fake import (
    StepBytes,
    fake_tensors,
    forward_peak,
    held_scratch,
    step_peak,
)
from leanlift.plan.logits import planned_finish
from leanlift.plan.remembered import Most
from leanlift.plan.result import CONTEXT, MemoryPlan
from leanlift.plan.seen import keeping_numbers
from leanlift.plan.settings import PlanSettings
from leanlift.plan.shapes import Planned, Shapes, attached, shapes_of
from leanlift.plan.sums import (
    adapter_nbytes,
    before_training,
    beside_training,
    blas_nbytes,
    brought,
    gradient_nbytes,
    held_nbytes,
    host_nbytes,
    moments_nbytes,
    one_selection_nbytes,
    updating_nbytes,
)
from leanlift.plan.work import Running, step_work

Known = dict[tuple[str, ...], Any]
"""What fake steps of one model and loss have shown, by all that decides it."""


def plan_step(
    planned: Planned,
    name: str,
    loss: Callable[..., Tensor],
    known: Known | None = None,
    generating: Callable[..., Tensor] | None = None,
) -> MemoryPlan:
    """Plan a run without loading a weight.

    Args:
        planned: the model and all settings.
        name: of the model, for the report.
        loss: what the step computes: `fake.Loss` that also takes how many tokens are
            `trained`, whether rows are `padded`, and the `finish` of the logits.
        known: of earlier plans for this model and loss, which are run once; added to.
        generating: what generates the rows while it trains; None: nothing does.

    Raises:
        UserError: an optimizer whose state has no rule, or a model without targets.
    """
    known = {} if known is None else known
    shapes, moving = _training(planned, loss, known)
    evaluating = _evaluating(planned, loss, known)
    settings = planned.settings
    given = _input_nbytes(settings.batch, settings.gradient_accumulation_steps, settings)
    moving = moving.beside(given)
    held = held_nbytes(planned, shapes)
    static = sum(held.values()) + blas_nbytes(planned)
    updating = given + updating_nbytes(planned, shapes, held)
    train = static + max(moving.peak, updating)
    categories = {**held, "gradients": gradient_nbytes(planned, held)}
    categories["activations and workspace"] = train - sum(categories.values())
    return MemoryPlan(
        model=name,
        categories={name: categories[name] for name in CATEGORIES if name in categories},
        phases={
            **before_training(planned, shapes, held),
            "train": train,
            **beside_training(planned, shapes, static, evaluating),
            **_generating(planned, static, generating, known),
        },
        step={
            "forward pass": moving.forward,
            "kept for the backward pass": moving.kept,
            "loss": moving.loss,
            "backward pass": moving.backward,
            "optimizer's step": updating,
            "one selection": one_selection_nbytes(planned, shapes),
        },
        entries=sum(shapes.entries),
        weights=shapes.weights,
        holds_for=_holds_for(planned),
        context=_context(planned.settings),
        host=host_nbytes(planned, shapes),
        adapter=adapter_nbytes(planned, shapes),
        moments=moments_nbytes(planned, shapes),
        work=step_work(shapes.work, running_of(planned, shapes)),
    )


def running_of(planned: Planned, shapes: Shapes) -> Running:
    """What of the settings decides a step's work."""
    settings, batch, streamed = planned.settings, planned.settings.batch, shapes.streamed
    return Running(
        rows=batch.rows,
        tokens=batch.tokens,
        trained=batch.rows * batch.tokens if batch.trained is None else batch.trained,
        times=settings.gradient_accumulation_steps,
        checkpointing=settings.gradient_checkpointing,
        kept=settings.kept_blocks,
        reuses=settings.reuse_weights,
        mlp_tokens=settings.mlp_tokens,
        fused=settings.fused_elementwise and settings.on_cuda,
        offloading=settings.activation_offloading,
        item=settings.model_dtype.itemsize,
        value=planned.value_nbytes,
        streamed=0 if streamed is None else streamed.tensors,
        learned=0 if streamed is None else host_nbytes(planned, shapes) - streamed.host,
        state=moments_nbytes(planned, shapes),
    )


def least_nbytes(planned: Planned) -> tuple[int, str]:
    """What a run needs at the very least, the CUDA context included and activations left out, and
    at which moment. Known from shapes alone; no plan of these settings says less."""
    shapes = shapes_of(planned)
    held = held_nbytes(planned, shapes)
    phases = before_training(planned, shapes, held)
    static = sum(held.values()) + blas_nbytes(planned)
    phases["optimizer's step"] = static + updating_nbytes(planned, shapes, held)
    moment = max(phases, key=phases.__getitem__)
    return phases[moment] + _context(planned.settings), moment


def _context(settings: PlanSettings) -> int:
    return CONTEXT if settings.on_cuda else 0


def _training(
    planned: Planned, loss: Callable[..., Tensor], known: Known
) -> tuple[Shapes, StepBytes]:
    """A model's shapes and the bytes of its step, which is run where it is not known."""
    settings, batch = planned.settings, planned.settings.batch
    key = ("train", *_what_decides(planned))
    if key not in known:
        with fake_tensors():
            shapes, model = attached(planned)
            if settings.gradient_checkpointing:
                check_checkpointing(model)
                model.gradient_checkpointing_enable({"use_reentrant": False})
                keep_last_blocks(model, settings.kept_blocks, settings.activation_offloading)
                without_input_gradients(model)
            with _in_one_sentence(model, "training step"):
                counted = _loss_of(model, loss, batch, known)
                with keeping_numbers(batch.seen is not None):
                    moving = step_peak(
                        model.train(),
                        counted,
                        batch.rows,
                        batch.tokens,
                        settings.optim_in_backward,
                        settings.accumulates,
                        settings.activation_offloading,
                        elsewhere=brought(planned, shapes),
                        most=_made_before(known),
                    )
        known[key] = replace(shapes, scratch=held_scratch(model)), moving
    found: tuple[Shapes, StepBytes] = known[key]
    return found


def _evaluating(planned: Planned, loss: Callable[..., Tensor], known: Known) -> int:
    """Bytes of an evaluation beyond what stays; 0 where there is none."""
    batch = planned.settings.eval_batch
    if batch is None:
        return 0
    of_it = replace(planned, settings=replace(planned.settings, largest=batch))
    key = ("evaluate", *_what_decides(of_it))
    if key not in known:
        with fake_tensors():
            _, model = attached(planned)
            with _in_one_sentence(model, "evaluation"):
                counted = _loss_of(model, loss, batch, known)
                with keeping_numbers(batch.seen is not None):
                    known[key] = forward_peak(
                        model.eval(), counted, batch.rows, batch.tokens, most=_made_before(known)
                    )
    return int(known[key]) + _input_nbytes(batch, 1, planned.settings)


def _generating(
    planned: Planned, static: int, generating: Callable[..., Tensor] | None, known: Known
) -> dict[str, int]:
    """The phase in which rows are generated, if they are: all those of a step at once, as TRL does
    it unless it is told otherwise."""
    if generating is None:
        return {}
    batch = planned.settings.batch
    rows = batch.rows * planned.settings.gradient_accumulation_steps
    key = ("generate", str(rows), *_what_decides(planned))
    if key not in known:
        with fake_tensors():
            _, model = attached(planned)
            with _in_one_sentence(model, "generation"):
                known[key] = forward_peak(model.eval(), generating, rows, batch.tokens, True)
    return {"generate": static + int(known[key])}


def _made_before(known: Known) -> Most:
    """What the layers of earlier plans have made; see `remembered`."""
    made: Most = known.setdefault(("made",), {})
    return made


def _loss_of(model: Any, loss: Callable[..., Tensor], batch: Batch, known: Known) -> Any:
    """The loss of a batch, as a function of model, ids and labels."""
    options: dict[str, Any] = {"trained": batch.trained, "padded": batch.padded}
    if batch.seen is not None:
        options["seen"] = batch.seen.inputs(batch.rows, batch.tokens, batch.padded)
    return partial(loss, finish=_finish(model, known), **options)


def _input_nbytes(batch: Batch, batches: int, settings: PlanSettings) -> int:
    """Of what batches with images hold: Trainer puts all those of a step on the card at once. On a
    CPU they are whose who makes them."""
    if batch.seen is None or not settings.on_cuda:
        return 0
    return batches * batch.seen.nbytes * batch.rows // batch.seen.rows


def _finish(model: Any, known: Known) -> Finish | None:
    """What a model makes of its logits, which no setting changes."""
    if ("finish",) not in known:
        known[("finish",)] = planned_finish(model)
    found: Finish | None = known[("finish",)]
    return found


@contextmanager
def _in_one_sentence(model: Any, what: str) -> Iterator[None]:
    """A step on fake tensors runs the family's own code, and each fails in its own way: where it
    asks for numbers that are not there, for one.

    Raises:
        UserError: in the place of whatever was raised.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the memory of this {type(model).__name__}'s {what} cannot be planned, as its code "
            f"does not run without numbers: {type(error).__name__}, {first_line(error)}"
        ) from error


def _what_decides(planned: Planned) -> tuple[str, ...]:
    """All that a step's bytes depend on: not on the optimizer, nor on how entries are chosen."""
    config, settings, plain = planned.config, planned.settings, LiftConfig()
    free = ("approx_rank", "refresh_interval", "refresh_margin", "retired_limit", "selector")
    alike = replace(config, **{name: getattr(plain, name) for name in free}, block=1)
    step = PlanSettings(
        largest=settings.batch,
        gradient_checkpointing=settings.gradient_checkpointing,
        kept_blocks=settings.kept_blocks,
        reuse_weights=settings.reuse_weights,
        gradient_accumulation_steps=min(2, settings.gradient_accumulation_steps),
        activation_offloading=settings.activation_offloading,
        optim_in_backward=settings.optim_in_backward,
        embedding_on_cpu=settings.embedding_on_cpu,
        stream_base=settings.stream_base,
        stream_state=settings.stream_state and settings.accumulates,
        tiled_mlp=settings.tiled_mlp,
        mlp_tokens=settings.mlp_tokens,
        fused_elementwise=settings.fused_elementwise,
        dtype=settings.dtype_name,
        cuda=settings.on_cuda,
    )
    return repr(alike), repr(planned.fmt), repr(step), str(config.block)


def _holds_for(planned: Planned) -> dict[str, Any]:
    """The settings that a plan holds for, JSON-ready."""
    config, fmt, settings = planned.config, planned.fmt, planned.settings
    batch, evaluated = settings.batch, settings.eval_batch
    return {
        "per_device_train_batch_size": batch.rows,
        "max_length": batch.tokens,
        "trained_tokens": batch.trained,
        "padded": batch.padded,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "base": "as stored" if fmt.kind == "dense" else fmt.kind,
        "bnb_4bit_use_double_quant": fmt.double,
        "dtype": settings.dtype_name,
        "exclude_modules": _listed(config.exclude_modules),
        "modules_to_save": _listed(config.modules_to_save),
        "trainable_token_indices": list(config.trainable_token_indices),
        "density_pattern": dict(config.density_pattern),
        "values_dtype": config.values_dtype,
        "optim": settings.optim,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "kept_blocks": settings.kept_blocks,
        "reuse_weights": settings.reuse_weights,
        "activation_offloading": settings.activation_offloading,
        "optim_in_backward": settings.optim_in_backward,
        "quantize_embeddings": config.quantize_embeddings,
        "embedding_on_cpu": settings.embedding_on_cpu,
        "stream_base": settings.stream_base,
        "stream_state": settings.stream_state,
        "tiled_mlp": settings.tiled_mlp,
        "mlp_tokens": settings.mlp_tokens,
        "fused_elementwise": settings.fused_elementwise,
        "refresh_interval": config.refresh_interval,
        "per_device_eval_batch_size": 0 if evaluated is None else evaluated.rows,
        "cuda": settings.on_cuda,
    }


def _listed(names: str | tuple[str, ...]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)
