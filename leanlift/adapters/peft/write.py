"""From an opened adapter to a form of PEFT's, planned before it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanlift.adapters.native import AdapterMetadata
from leanlift.adapters.offsets import Adapter
from leanlift.adapters.peft.form import PREFIX, PeftForm
from leanlift.errors import UserError
from leanlift.io.places import CONFIG_NAME, FACTS_NAME
from leanlift.io.tensors import ShardedWriter, TensorSpec, write_json
from leanlift.sparse import LayerOffsets
from leanlift.weights.quantized import dtype_of


@dataclass(frozen=True)
class PeftPlan:
    """What a form of an adapter will be like, before it is written.

    Attributes:
        form: which.
        settings: what its configuration says of the budget.
        entries: per module, how many are active and how many retired.
        room: e of each module.
        specs: the tensors, in the order of the file.
    """

    form: PeftForm
    settings: dict[str, Any]
    entries: dict[str, list[int]]
    room: dict[str, int]
    specs: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)

    @property
    def count(self) -> int:
        """The adapter's own entries."""
        return sum(sum(counts) for counts in self.entries.values())

    @property
    def padding(self) -> int:
        """Zeros at the first position beside them."""
        return sum(self.room.values()) - self.count


def plan_peft(adapter: Adapter, form: PeftForm) -> PeftPlan:
    """Find the budget and the tensors of an adapter in a form of PEFT's.

    Raises:
        UserError: a damaged adapter, or what has no place in that form.
    """
    _check_held(adapter, form)
    shapes = adapter.base.shapes
    entries = {name: _counts(adapter.layer(name)) for name in shapes}
    settings = form.settings(shapes, {name: sum(counts) for name, counts in entries.items()})
    room = {name: form.room(settings, shape) for name, shape in shapes.items()}
    dtype, specs = dtype_of(adapter.config.values_dtype), []
    for name, e in room.items():
        key = f"{PREFIX}{name}"
        specs.append(TensorSpec(f"{key}{form.positions}", form.positions_shape(e), torch.int32))
        specs.append(TensorSpec(f"{key}{form.offsets}", (e,), dtype))
    return PeftPlan(form, settings, entries, room, tuple(specs))


def _check_held(adapter: Adapter, form: PeftForm) -> None:
    """Refuse what is more than offsets to some entries of Linears.

    Raises:
        UserError: says what.
    """
    base = adapter.base
    turned = next(filter(base.layout.is_turned, base.shapes), None)
    if turned is not None:
        raise UserError(
            f"{turned} keeps the transpose of its matrix, as a Conv1D does, and PEFT's "
            f"{form.words} takes Linears alone: merge it instead."
        )
    ends = tuple(f".{name}" for name in adapter.config.modules_to_save)
    extra = [f"a new {name}" for name in base.new]
    extra += [f"experts ({name})" for name in base.parts]
    extra += ["rows of the embedding"] if adapter.embedding is not None else []
    if adapter.grown is not None:
        extra += [f"an embedding of {adapter.grown.rows} rows, more than its base's"]
    extra += [f"the whole of {name}" for name in base.shapes if f".{name}".endswith(ends)]
    if extra:
        raise UserError(
            f"{adapter.directory} was trained with {extra[0]}, which PEFT's {form.words} has no "
            "place for: merge it instead."
        )


def write_peft(
    directory: Path, adapter: Adapter, plan: PeftPlan, progress: Callable[[Any], Any]
) -> None:
    """Write `adapter` as an adapter that stock PEFT loads, module by module.

    Args:
        directory: where; it exists.
        adapter: an opened adapter.
        plan: of `plan_peft`.
        progress: wraps the modules that are iterated over.
    """
    shapes, form = adapter.base.shapes, plan.form
    dtype = dtype_of(adapter.config.values_dtype)
    with ShardedWriter(directory, list(plan.specs), plan.nbytes, stem="adapter_model") as writer:
        for name in progress(shapes):
            flat, offsets = _padded(adapter.layer(name), plan.room[name], dtype)
            positions = form.encode(flat, shapes[name])
            writer.write(f"{PREFIX}{name}{form.positions}", [positions])
            writer.write(f"{PREFIX}{name}{form.offsets}", [offsets])
    write_json(
        directory / CONFIG_NAME,
        {
            "peft_type": form.peft_type,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": adapter.base.name,
            **plan.settings,
            "target_modules": list(shapes),
            "inference_mode": True,
        },
    )
    facts = AdapterMetadata(adapter.config, adapter.base, adapter.refreshes, adapter.special)
    write_json(directory / FACTS_NAME, {**facts.to_dict(), "entries": plan.entries})


def _counts(offsets: LayerOffsets) -> list[int]:
    return [offsets.active.index.count, offsets.count - offsets.active.index.count]


def _padded(offsets: LayerOffsets, room: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Flat positions int64 [e] and offsets [e]: active, retired, zeros."""
    flat, values = torch.zeros(room, dtype=torch.int64), torch.zeros(room, dtype=dtype)
    at = 0
    for store in offsets.stores:
        stop = at + store.index.count
        flat[at:stop] = store.index.to_flat()
        values[at:stop] = store.values
        at = stop
    return flat, values
