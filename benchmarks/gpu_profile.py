"""Where a step's time goes on a GPU, by class of kernel, and how long the host takes for it.

A part of `gpu_proof`. The classes are those of `step_model`, so that what it models stands beside
what is measured line by line. A product looks like any other by its name: that of the values'
gradients is known by a mark around what forms it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks import card
from benchmarks.card import Span
from benchmarks.trainee import Scale, Trainee

Rows = list[dict[str, Any]]

GRADIENTS = "gradients of values"
CLASSES = {
    "dequantize and patch": r"effective_rows|[Dd]equantize",
    "gather": r"^gather_kernel",
    "optimizer": r"adamw_kernel|[Oo]ptimizer|FusedAdam|multi_tensor_apply",
    "attention": r"flash|sdpa|fmha|attention",
    "products": r"nvjet|gemm|cutlass|cublas|matmul|xmma|splitK|[Gg]emv",
    "over the bus": r"Memcpy (HtoD|DtoH)",
    "elementwise": (
        r"elementwise|[Rr]educe|Cat|silu|swiglu|[Ss]oft[Mm]ax|norm|rope|Memcpy|Memset|copy|index|"
        r"scan|cumsum|multi_tensor|gather|scatter|embedding|fill|triton_"
    ),
}
"""What is in a kernel's name, by class; the first that fits counts. "over the bus" is no class of
the model's, whose card does not wait for it."""


def class_of(kernel: str) -> str:
    return next((kind for kind, words in CLASSES.items() if re.search(words, kernel)), "other")


def by_class(spans: Iterable[Span]) -> dict[str, float]:
    """Milliseconds of kernels by class. What lies in a mark of `GRADIENTS` is of that class, but
    for the gather."""
    spans = list(spans)
    marks = [span for span in spans if span.is_mark and span.name == GRADIENTS]
    spent: dict[str, float] = {}
    for span in spans:
        if span.is_mark:
            continue
        kind = class_of(span.name)
        marked = any(mark.start <= span.start and span.end <= mark.end for mark in marks)
        if marked and kind != "gather":
            kind = GRADIENTS
        spent[kind] = spent.get(kind, 0.0) + (span.end - span.start) / 1e3
    return spent


def profiled(trainee: Trainee, name: str, modelled: dict[str, float] | None = None) -> Rows:
    """Milliseconds of one step: kernels by class, the modelled ones beside them, the host's alone.

    Args:
        trainee: what steps.
        name: of it, in the rows.
        modelled: milliseconds by class, of `modelled_step`; None: there is no model of it.
    """
    card.synchronize()
    started = time.perf_counter()
    trainee.once()
    host = time.perf_counter() - started
    card.synchronize()
    with marked():
        spans = card.spans(trainee.once)
    trainee.optimizer.zero_grad()
    spent, modelled = by_class(spans), modelled or {}
    rows: Rows = [
        {"what": f"{name}, host ms", "value": round(1e3 * host, 1)},
        {"what": f"{name}, kernels ms", "value": round(sum(spent.values()), 1)},
        {"what": f"{name}, kernels", "value": sum(not span.is_mark for span in spans)},
    ]
    for kind in sorted({*spent, *modelled}, key=lambda kind: -spent.get(kind, 0.0)):
        rows.append({"what": f"{name}, {kind}, ms", "value": round(spent.get(kind, 0.0), 2)})
        if kind in modelled:
            value = round(modelled[kind], 2)
            rows.append({"what": f"{name}, {kind}, modelled ms", "value": value})
    return rows


@contextmanager
def marked() -> Iterator[None]:
    """Let every layer mark what it forms the gradients of its values with."""
    from leanlift.layers import LiftLinear

    stock = LiftLinear.formed_gradient

    def formed(*arguments: Any, **named: Any) -> None:
        with torch.profiler.record_function(GRADIENTS):
            stock(*arguments, **named)

    LiftLinear.formed_gradient = formed
    try:
        yield
    finally:
        LiftLinear.formed_gradient = stock


def modelled_step(scale: Scale, method: str) -> dict[str, float]:
    """Milliseconds by class that `step_model` says of this card; nothing where its sheet is not
    known.

    Args:
        scale: of the model and its rows.
        method: "leanlift" in its default setting, or "QLoRA".
    """
    from benchmarks.step_model import ours, qlora, seconds

    known = card.sheet() if scale.cuda else None
    if known is None:
        return {}
    classes = {"leanlift": ours, "QLoRA": qlora}[method](*counted_step(scale))
    return {kind: 1e3 * seconds(part, known) for kind, part in classes.items()}


def counted_step(scale: Scale) -> tuple[Any, Any]:
    """The work of a step of the proof's model, as `step_model.counted` has it."""
    from benchmarks.peers import llama
    from benchmarks.step_model import counted

    return counted(llama(*scale.shape), max_length=scale.tokens)


def speed(scale: Scale, name: str, step: float) -> Rows:
    """Tokens a second, and the share of the card's FLOPs that goes into what any method has to
    multiply: forward and for the inputs' gradients. Nothing that is computed again counts, nor what
    a method multiplies for its own gradients.

    Args:
        scale: of the model and its rows.
        name: of what was measured.
        step: seconds.
    """
    from dataclasses import replace

    from benchmarks.step_model import ours

    rows: Rows = [{"what": f"{name}, tokens/s", "value": round(scale.tokens / step)}]
    known = card.sheet() if scale.cuda else None
    if known is not None:
        model, run = counted_step(scale)
        part = ours(model, replace(run, checkpointing=False))
        flop = part["products"].products + part["attention"].attention
        share = round(flop / step / known.flops, 4)
        what = f"{name}, share of {known.flops / 1e12:g} TFLOP/s ({known.name})"
        rows.append({"what": what, "value": share})
    return rows
