"""The PEFT form: a SHiRA adapter, which stock PEFT loads without leanlift.

PEFT's SHiRA (sparse high-rank adapters) keeps per module `shira_indices` (int32 [2, e]: rows,
then columns) and `shira_weight` (float [e]), and adds them to the weight. It wants e = r · (m + n)
with one r for all modules, so shorter lists are padded with zeros at (0, 0); positions that occur
twice are added up. 12 bytes an entry with fp32 offsets, where leanlift's own form has 5.1.

What PEFT has no place for goes to `leanlift.json` beside it: the fingerprint of the base, the
LiftConfig, and how many entries of each module are active and retired (they come in that order,
each sorted). An adapter without that file, trained by PEFT itself, is read over a live model,
which then says what the base is.

Shapes: m rows, n columns, e entries of a module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanlift.adapters.native import AdapterMetadata, check_backed, check_values
from leanlift.adapters.offsets import Adapter
from leanlift.config import LiftConfig
from leanlift.errors import UserError
from leanlift.fingerprint import BaseFingerprint
from leanlift.io.bounded import MOST_OF_A_STRANGER
from leanlift.io.places import CONFIG_NAME, FACTS_NAME, PEFT_TYPE, WEIGHTS_NAME
from leanlift.io.tensors import ShardedWriter, TensorFile, TensorSpec, read_json, write_json
from leanlift.sparse import LayerOffsets, Offsets
from leanlift.weights.quantized import dtype_of

PREFIX = "base_model.model."
INDICES, WEIGHT = ".shira_indices", ".shira_weight"


def shira_rank(shapes: dict[str, tuple[int, int]], entries: dict[str, int]) -> int:
    """The smallest r whose r · (m + n) holds the entries of every module.

    Raises:
        UserError: a module too small for the r that another one needs.
    """
    needs = {name: -(-entries[name] // sum(shape)) for name, shape in shapes.items()}
    name, r = max(needs.items(), key=lambda item: item[1])
    for other, (m, n) in shapes.items():
        if r * (m + n) > m * n:
            raise UserError(
                f"{name} has {entries[name]} entries, for which PEFT's SHiRA needs r={r}; it uses "
                f"one r for all modules, and {other} ({m}x{n}) has room for {m * n // (m + n)} at "
                "most: this adapter has no PEFT form; merge it instead."
            )
    return max(1, r)


@dataclass(frozen=True)
class ShiraPlan:
    """What a SHiRA form of an adapter will be like, before it is written.

    Attributes:
        rank: r, of all modules.
        entries: per module, how many are active and how many retired.
        specs: the tensors, in the order of the file.
    """

    rank: int
    entries: dict[str, list[int]]
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
        """Zeros at (0, 0) beside them."""
        room = sum(spec.shape[0] for spec in self.specs if spec.name.endswith(WEIGHT))
        return room - self.count


def plan_shira(adapter: Adapter) -> ShiraPlan:
    """Find the rank and the tensors of an adapter's SHiRA form.

    Raises:
        UserError: a damaged adapter, or entries or rows that have no room in PEFT's form.
    """
    extra = [f"a new {name}" for name in adapter.base.new]
    extra += [f"experts ({name})" for name in adapter.base.parts]
    extra += ["rows of the embedding"] if adapter.embedding is not None else []
    if adapter.grown is not None:
        extra += [f"an embedding of {adapter.grown.rows} rows, more than its base's"]
    if extra:
        raise UserError(
            f"{adapter.directory} was trained with {extra[0]}, which PEFT's SHiRA has no place "
            "for: merge it instead."
        )
    shapes = adapter.base.shapes
    entries = {name: _counts(adapter.layer(name)) for name in shapes}
    rank = shira_rank(shapes, {name: sum(counts) for name, counts in entries.items()})
    dtype, specs = dtype_of(adapter.config.values_dtype), []
    for name, (m, n) in shapes.items():
        room = rank * (m + n)
        specs.append(TensorSpec(f"{PREFIX}{name}{INDICES}", (2, room), torch.int32))
        specs.append(TensorSpec(f"{PREFIX}{name}{WEIGHT}", (room,), dtype))
    return ShiraPlan(rank, entries, tuple(specs))


def write_shira(
    directory: Path, adapter: Adapter, plan: ShiraPlan, progress: Callable[[Any], Any]
) -> None:
    """Write `adapter` as a stock PEFT SHiRA adapter, module by module.

    Args:
        directory: where; it exists.
        adapter: an opened adapter.
        plan: of `plan_shira(adapter)`.
        progress: wraps the modules that are iterated over.
    """
    shapes = adapter.base.shapes
    dtype = dtype_of(adapter.config.values_dtype)
    with ShardedWriter(directory, list(plan.specs), plan.nbytes, stem="adapter_model") as writer:
        for name in progress(shapes):
            indices, weight = _to_shira(adapter.layer(name), shapes[name], plan.rank, dtype)
            writer.write(f"{PREFIX}{name}{INDICES}", [indices])
            writer.write(f"{PREFIX}{name}{WEIGHT}", [weight])
    write_json(
        directory / CONFIG_NAME,
        {
            "peft_type": PEFT_TYPE,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": adapter.base.name,
            "r": plan.rank,
            "mask_type": "leanlift",
            "target_modules": list(shapes),
            "inference_mode": True,
        },
    )
    facts = AdapterMetadata(adapter.config, adapter.base, adapter.refreshes, adapter.special)
    write_json(directory / FACTS_NAME, {**facts.to_dict(), "entries": plan.entries})


def _counts(offsets: LayerOffsets) -> list[int]:
    return [offsets.active.index.count, offsets.count - offsets.active.index.count]


def _to_shira(
    offsets: LayerOffsets, shape: tuple[int, int], r: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`shira_indices` and `shira_weight`, padded."""
    room = r * sum(shape)
    indices = torch.zeros(2, room, dtype=torch.int32)
    weight = torch.zeros(room, dtype=dtype)
    at = 0
    for store in offsets.stores:
        flat = store.index.to_flat()
        stop = at + flat.numel()
        indices[0, at:stop] = flat // shape[1]
        indices[1, at:stop] = flat % shape[1]
        weight[at:stop] = store.values
        at = stop
    return indices, weight


def read_shira(
    directory: Path,
    data: dict[str, Any],
    tensors: TensorFile,
    live_base: Callable[[list[str]], BaseFingerprint] | None,
) -> Adapter:
    """A PEFT SHiRA adapter, of leanlift or of PEFT itself.

    Args:
        directory: where it is.
        data: its adapter_config.json.
        tensors: its tensors.
        live_base: gives the fingerprint of a live model for the named modules; for adapters that
            do not say what their base is.

    Raises:
        UserError: what PEFT could not load either, or a base that nobody knows.
    """
    if data.get("fan_in_fan_out"):
        raise UserError(
            f"{directory} is for transposed weights (fan_in_fan_out), which leanlift does not have."
        )
    names = _module_names(tensors)
    if (directory / FACTS_NAME).is_file():
        metadata, split = _own_metadata(directory / FACTS_NAME, names)
    else:
        metadata, split = _metadata_of_peft(directory, data, names, live_base), None

    dtype = dtype_of(metadata.config.values_dtype)

    def read(name: str) -> LayerOffsets:
        shape = metadata.base.shapes[name]
        flat, weight = _read_entries(tensors, name, shape, dtype)
        if split is None:
            return LayerOffsets(_added_up(flat, weight, shape, f"{name} in {tensors.path}"), None)
        active, retired = split[name]
        return _split_up(flat, weight, shape, active, retired, f"{name} in {tensors.path}")

    return Adapter(
        directory,
        "shira",
        metadata.config,
        metadata.base,
        metadata.refreshes,
        metadata.special,
        read,
    )


Split = dict[str, list[int]]
"""How many entries of each module are active, and how many retired."""


def _own_metadata(path: Path, names: list[str]) -> tuple[AdapterMetadata, Split]:
    """What leanlift has written beside PEFT's files.

    Raises:
        UserError: it is damaged, or speaks of other modules than these.
    """
    known = read_json(path, MOST_OF_A_STRANGER)
    if not isinstance(known, dict):
        raise UserError(f"{path} is damaged: expected a JSON object.")
    metadata, split = AdapterMetadata.from_dict(known, path), known.get("entries")
    if not _is_split(split, set(metadata.base.shapes)) or set(names) != set(metadata.base.shapes):
        raise UserError(f"{path} and {WEIGHTS_NAME} beside it do not speak of the same modules.")
    if metadata.grown is not None:
        raise UserError(f"{path} is damaged: PEFT's form has no place for embedding_rows.")
    assert isinstance(split, dict)
    return metadata, split


def _metadata_of_peft(
    directory: Path,
    data: dict[str, Any],
    names: list[str],
    live_base: Callable[[list[str]], BaseFingerprint] | None,
) -> AdapterMetadata:
    """What is known of an adapter that PEFT itself has trained, from a live model.

    Raises:
        UserError: there is no live model, or it has not these modules; no rank that can be.
    """
    if live_base is None:
        raise UserError(
            f"{directory} is a SHiRA adapter of PEFT, which does not say what exactly its base "
            "is: load it into the base with load_adapter(model, ...), then save_adapter."
        )
    rank = data.get("r")
    if type(rank) is not int or rank < 1:
        raise UserError(f"{directory / CONFIG_NAME} has r={rank!r:.80}; expected 1 or more.")
    config = LiftConfig(rank_budget=rank, selector="random", target_modules=tuple(names))
    base = live_base(names)
    lacking = [name for name in names if name not in base.shapes]
    if lacking:
        raise UserError(
            f"{directory} changes {lacking[0]!r:.120}, but the loaded model has no such Linear "
            "in its blocks: load the adapter's own base."
        )
    return AdapterMetadata(config, base, 0)


def _module_names(tensors: TensorFile) -> list[str]:
    names = []
    for key in tensors.names:
        inner = key.removeprefix(PREFIX)
        name = inner.removesuffix(WEIGHT).removesuffix(INDICES)
        if inner == key or name == inner:
            raise UserError(
                f"{tensors.path} holds {key!r:.120}, which is no part of a SHiRA adapter: leanlift "
                "reads adapters that change the weights of Linears alone."
            )
        names.append(name)
    if not names:
        raise UserError(f"{tensors.path} is empty: it is no adapter.")
    return list(dict.fromkeys(names))


def _is_split(split: Any, names: set[str]) -> bool:
    return (
        isinstance(split, dict)
        and set(split) == names
        and all(
            isinstance(pair, list)
            and len(pair) == 2
            and all(type(count) is int and count >= 0 for count in pair)
            for pair in split.values()
        )
    )


def _read_entries(
    tensors: TensorFile, name: str, shape: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Flat positions int64 [e] and offsets [e] of a module in file order, padding included."""
    m, n = shape
    weight = tensors.get(f"{PREFIX}{name}{WEIGHT}")
    check_backed(shape, weight.numel(), f"{name} in {tensors.path}")
    indices = tensors.get(f"{PREFIX}{name}{INDICES}")
    check_values(weight, dtype, f"{name}{WEIGHT} in {tensors.path}")
    if indices.dtype not in (torch.int32, torch.int64) or indices.shape != (2, weight.numel()):
        raise UserError(
            f"{name}{INDICES} in {tensors.path} is {indices.dtype} {tuple(indices.shape)}; "
            f"expected int32 (2, {weight.numel()})."
        )
    rows, columns = indices.long()
    inside = (rows >= 0) & (rows < m) & (columns >= 0) & (columns < n)
    if not bool(inside.all()):
        raise UserError(f"{name} in {tensors.path} has positions outside its {m}x{n} matrix.")
    return rows * n + columns, weight


def _added_up(flat: Tensor, weight: Tensor, shape: tuple[int, int], what: str) -> Offsets:
    """Entries in any order; positions that occur twice are added up, as PEFT does."""
    real = ((flat != 0) | (weight != 0)).nonzero()  # what stands behind the last one is padding
    kept = int(real[-1]) + 1 if len(real) else 1
    distinct, where = flat[:kept].unique(sorted=True, return_inverse=True)
    total = torch.zeros(distinct.numel()).index_add_(0, where, weight[:kept].float())
    check_values(total, torch.float32, what)  # finite numbers can have an infinite sum
    return Offsets.from_flat(distinct, total, shape)


def _split_up(
    flat: Tensor, weight: Tensor, shape: tuple[int, int], active: int, retired: int, what: str
) -> LayerOffsets:
    """Entries in the order in which `write_shira` has them: active, retired, padding."""
    count = active + retired
    if count > flat.numel() or bool(flat[count:].any()) or bool(weight[count:].any()):
        raise UserError(
            f"{what} has other entries than the {active} active and {retired} retired ones that "
            f"{FACTS_NAME} speaks of."
        )
    try:
        trained = Offsets.from_flat(flat[:active], weight[:active], shape)
        rest = Offsets.from_flat(flat[active:count], weight[active:count], shape)
    except ValueError as error:
        raise UserError(f"the positions of {what} are broken: {error}.") from None
    offsets = LayerOffsets(trained, rest if retired else None)
    offsets.check_disjoint(what)
    return offsets
