"""All that the GPU proof asks of a card, so that a test can answer in its place.

A part of `gpu_proof`, whose other parts ask torch for nothing that there is on a GPU alone.
"""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from leanlift.errors import UserError
from leanlift.layers.gradient_rows import cache_of
from leanlift.plan.cards import Card, card_named

GIB = 2**30


def present() -> bool:
    """Whether there is one."""
    return torch.cuda.is_available()


def name() -> str:
    """As its driver has it."""
    return torch.cuda.get_device_name()


def sheet() -> Card | None:
    """What its sheet says; None: it is none of those that are known. A name that says more than a
    sheet's ("NVIDIA H100 80GB HBM3") is taken by the part that has a number in it."""
    for asked in (name(), *re.findall(r"\b[A-Z]+\d+\b", name())):
        try:
            return card_named(asked)
        except UserError:
            continue
    return None


def synchronize() -> None:
    torch.cuda.synchronize()


def allocated() -> int:
    """Bytes of tensors, and of what else torch has from its allocator."""
    return torch.cuda.memory_allocated()


def reset_peaks() -> None:
    torch.cuda.reset_peak_memory_stats()


def peak() -> int:
    """The most bytes allocated since `reset_peaks`."""
    return torch.cuda.max_memory_allocated()


def reserved_peak() -> int:
    """The most bytes that torch had from the driver since then."""
    return torch.cuda.max_memory_reserved()


def release() -> None:
    """Give back what is reserved and holds nothing."""
    torch.cuda.empty_cache()


def pinned() -> int:
    """Bytes that torch has pinned of the host's memory."""
    stats = getattr(torch.cuda, "host_memory_stats", dict)()
    return int(stats.get("allocated_bytes.current", 0))


def cache() -> tuple[int, int]:
    """Bytes of the second-level cache, and multiprocessors."""
    return cache_of(torch.device("cuda", 0))


@contextmanager
def capped(gib: float) -> Iterator[None]:
    """The allocator may take so much and no more, as on a smaller card."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def replayed(run: Callable[[], None]) -> Callable[[], None]:
    """`run` as a CUDA graph, or itself where it asks the device for something."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run
    return graph.replay


def waits(run: Callable[[], Any], own: Path) -> list[str]:
    """Where files under `own` make the host wait for the device while `run` runs."""
    found: list[str] = []

    def note(message: Any, *_: Any, **__: Any) -> None:
        frames = [f for f in traceback.extract_stack() if "torch" not in Path(f.filename).parts]
        asked = next((f for f in reversed(frames) if f.filename != __file__), None)
        if asked is not None and own in Path(asked.filename).parents:
            found.append(f"{Path(asked.filename).name}:{asked.lineno}")

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():  # which puts back `showwarning` too
            warnings.simplefilter("always")
            warnings.showwarning = note
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sorted(set(found))


@dataclass(frozen=True)
class Span:
    """Something on the device's time line.

    Attributes:
        name: of the kernel, or of the mark.
        start, end: microseconds.
        is_mark: whether it is the stretch of a `record_function`, from the first kernel that was
            launched in it to the last.
    """

    name: str
    start: float
    end: float
    is_mark: bool = False


def spans(run: Callable[[], Any]) -> list[Span]:
    """Kernels, copies and marks of what `run` has the device do."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return [
        Span(e.name, e.time_range.start, e.time_range.end, bool(e.is_user_annotation))
        for e in profiler.events()
        if e.device_type == torch.autograd.DeviceType.CUDA
    ]
