"""Where the memory of a run went: peaks per phase, bytes per category.

A run has phases (load, select, train, export). A phase's peak comes from the allocator on CUDA;
on a CPU it is the peak of live tensor bytes (`LiveBytes`) and of the process's resident memory.
Categories are counted from the real tensors. What no category claims of the training peak is
activations and workspace.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from leanlift.io.machine import machine_nbytes
from leanlift.layers import FrozenLinear, LiftEmbedding, LiftLinear, TiedHead
from leanlift.layers.embedding import FrozenEmbedding
from leanlift.layers.frozen_head import FrozenHead
from leanlift.measure.live import LiveBytes
from leanlift.optim import state_nbytes
from leanlift.streaming import STREAMED, Pool
from leanlift.weights.places import weight_tables, weight_tensors


@dataclass
class PhasePeak:
    """One phase of a run. All figures in bytes, None where this machine cannot tell.

    Attributes:
        seconds: wall time.
        tensors: peak of live tensor bytes (CPU) or of allocated bytes (CUDA).
        reserved: peak of what CUDA's caching allocator held.
        resident: peak resident memory of the process (CPU only).
    """

    seconds: float
    tensors: int | None = None
    reserved: int | None = None
    resident: int | None = None


@dataclass
class MemoryReport:
    """What a run measured; `to_dict` is what `memory.json` holds.

    Attributes:
        device: "cpu" or the GPU's name.
        phases: name -> PhasePeak.
        categories: bytes of the training step by category.
        notes: how a figure was obtained, where that is not obvious.
        plan: what had been planned, as `MemoryPlan.to_dict` has it; None: nothing.
        capacity: bytes that the device has; None where this machine cannot tell.
        versions: of Python and of the libraries that decide what a run does.
    """

    device: str
    phases: dict[str, PhasePeak] = field(default_factory=dict)
    categories: dict[str, int] = field(default_factory=dict)
    entries: int = 0
    notes: list[str] = field(default_factory=list)
    plan: dict[str, Any] | None = None
    capacity: int | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)


CATEGORIES = (
    "base weights",
    "embeddings and head",
    "norms and other",
    "index",
    "values",
    "retired entries",
    "gradients",
    "optimizer state",
    "streamed state",
    "scratch",
    "activations and workspace",
)


def tensor_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the distinct storages behind these tensors."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if tensor is not None
    }
    return sum(storages.values())


def held_on_device(layer: FrozenLinear) -> list[Tensor]:
    """The tensors of a layer's frozen weight where it computes: of one that is streamed, the
    buffers of its pool, and on a CPU, where both are the same memory, what they are filled from."""
    where = getattr(layer.base.weight, STREAMED, None)
    if where is None:
        return weight_tensors(layer.base)
    pool: Pool = where[0]
    tables = [getattr(holder, name) for holder, name in weight_tables(layer.base)]
    host = [block.host for block in pool.blocks] if pool.device.type == "cpu" else []
    return [*(buffer.memory for buffer in pool.buffers), *host, *tables]


def state_buffers(model: nn.Module) -> list[Tensor]:
    """What holds the state of blocks that come with it: the device's buffers, and on a CPU, where
    both are the same memory, the host's."""
    layers = [module for module in model.modules() if isinstance(module, LiftLinear)]
    pool = next((layer.brought_by[0] for layer in layers if layer.brought_by is not None), None)
    if pool is None:
        return []
    host = [block.host for block in pool.blocks] if pool.device.type == "cpu" else []
    return [*(buffer.memory for buffer in pool.buffers), *host]


def static_categories(model: nn.Module) -> dict[str, int]:
    """Bytes that stay from step to step, by category (without the optimizer's)."""
    layers = [module for module in model.modules() if isinstance(module, LiftLinear)]
    linears = [m for m in model.modules() if isinstance(m, FrozenLinear)]
    linears = [linear for linear in linears if not isinstance(linear, LiftEmbedding)]
    frozen: list[Tensor] = [t for linear in linears for t in held_on_device(linear)]
    ends: list[Tensor] = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, getter, lambda: None)()
        if isinstance(module, (LiftEmbedding, TiedHead)):
            module = module.lookup if isinstance(module, LiftEmbedding) else module.frozen
        if isinstance(module, FrozenEmbedding):
            ends.extend(weight_tensors(module.storage))
        elif isinstance(module, FrozenHead):
            ends.extend(weight_tensors(module.base))
        elif module is not None and not isinstance(module, FrozenLinear):  # else it is a target
            ends.extend(parameter.data for parameter in module.parameters())
    brought = [layer for layer in layers if layer.brought_by is not None]
    here = [layer for layer in layers if layer.brought_by is None]
    state = state_buffers(model)
    slots = [slot for layer in here for slot in (layer.worn, *layer.shelf.values())]
    values = [slot.values.data for slot in slots]
    retired = [layer.retired_values for layer in here if layer.retired_values is not None]
    retired_index = [layer.retired_index for layer in here if layer.retired_index is not None]
    anchors = sum(layer.index.anchors.nbytes for layer in brought)
    counted = {t.untyped_storage().data_ptr() for t in (*frozen, *ends, *values, *retired)}
    counted |= {layer.values.untyped_storage().data_ptr() for layer in brought}
    other = [
        tensor.data
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.untyped_storage().data_ptr() not in counted and not hasattr(tensor, STREAMED)
    ]
    return {
        "base weights": tensor_bytes(frozen),
        "embeddings and head": tensor_bytes(ends),
        "norms and other": tensor_bytes(other),
        "index": anchors + sum(slot.index.nbytes for slot in slots if slot.index.count),
        "values": tensor_bytes(values),
        "retired entries": tensor_bytes(retired) + sum(index.nbytes for index in retired_index),
        "gradients": tensor_bytes(layer.values.grad for layer in layers),
        **({"streamed state": tensor_bytes(state)} if state else {}),
        "scratch": layers[0].scratch.nbytes if layers else 0,
    }


class MemoryMeter:
    """Measures the phases of a run and collects the report.

    Args:
        device: where the model lives.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        name = torch.cuda.get_device_name(device) if self.cuda else "cpu"
        self.report = MemoryReport(
            device=name, capacity=_capacity_of(device), versions=versions_here()
        )

    def allocated_peak(self) -> int:
        """Peak allocated bytes on CUDA since the phase began."""
        return torch.cuda.max_memory_allocated(self.device)

    @contextmanager
    def phase(self, name: str, follow: bool = False, static: int = 0) -> Iterator[PhasePeak]:
        """Measure a phase.

        Args:
            name: its name in the report.
            follow: on a CPU, follow live tensors during the whole phase.
            static: bytes of tensors that exist already; added to what is followed.
        """
        self._reset()
        peak = PhasePeak(seconds=0.0)
        live = LiveBytes() if follow and not self.cuda else None
        started = time.perf_counter()
        try:
            if live is None:
                yield peak
            else:
                with live:
                    yield peak
        finally:
            peak.seconds = time.perf_counter() - started
            if live is not None:
                peak.tensors = static + live.peak
            self._read(peak)
            self.report.phases[name] = peak

    def add_training(
        self, model: nn.Module, optimizer: Optimizer | None, gradients: int, peak: int
    ) -> None:
        """Split the training peak into categories; `gradients` as seen before the update."""
        categories = {
            **static_categories(model),
            "optimizer state": state_nbytes(optimizer, state_buffers(model)),
        }
        categories["gradients"] = gradients
        rest = peak - sum(categories.values())
        categories["activations and workspace"] = max(0, rest)
        self.report.categories = {n: categories[n] for n in CATEGORIES if n in categories}
        self.report.entries = sum(
            m.index.count for m in model.modules() if isinstance(m, LiftLinear)
        )

    def _reset(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):  # resets VmHWM on Linux
                Path("/proc/self/clear_refs").write_text("5")

    def _read(self, peak: PhasePeak) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)
            peak.tensors = torch.cuda.max_memory_allocated(self.device)
            peak.reserved = torch.cuda.max_memory_reserved(self.device)
        else:
            peak.resident = resident_peak()


LIBRARIES = ("leanlift", "torch", "transformers", "trl", "bitsandbytes", "triton")


def versions_here() -> dict[str, str]:
    """Versions of Python and of what is installed of `LIBRARIES`."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device has no room: torch has a class for it on a GPU alone."""
    on_the_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return on_the_cpu or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def resident_peak() -> int:
    """Peak resident bytes of this process since the last reset (or its start)."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_now() -> int | None:
    """Resident bytes of this process; None where this system does not tell."""
    with suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return None


def _capacity_of(device: torch.device) -> int | None:
    """Bytes of a CUDA device, or of this machine's memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return machine_nbytes()
