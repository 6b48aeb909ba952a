"""From a form of PEFT's to an opened adapter, whoever has written it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanlift.adapters.native import AdapterMetadata, check_backed, check_values
from leanlift.adapters.offsets import Adapter
from leanlift.adapters.peft.form import INTEGERS, PREFIX, PeftForm
from leanlift.errors import UserError
from leanlift.fingerprint import BaseFingerprint
from leanlift.io.bounded import MOST_OF_A_STRANGER
from leanlift.io.places import CONFIG_NAME, FACTS_NAME, WEIGHTS_NAME
from leanlift.io.tensors import TensorFile, read_json
from leanlift.sparse import LayerOffsets, Offsets
from leanlift.weights.quantized import dtype_of

Split = dict[str, list[int]]
"""How many entries of each module are active, and how many retired."""

BaseOf = Callable[[list[str]], BaseFingerprint]
"""Gives the fingerprint of a base for the named modules, those of them that it has."""


@dataclass(frozen=True)
class _File:
    """The tensors of a form, module by module."""

    form: PeftForm
    tensors: TensorFile

    def names(self) -> list[str]:
        """Of the modules.

        Raises:
            UserError: a tensor that is no part of the form, or none at all.
        """
        form, names = self.form, []
        for key in self.tensors.names:
            inner = key.removeprefix(PREFIX)
            name = inner.removesuffix(form.offsets).removesuffix(form.positions)
            if inner == key or name == inner:
                raise UserError(
                    f"{self.tensors.path} holds {key!r:.120}, which is no part of a {form.words} "
                    "adapter: leanlift reads adapters that change the weights of Linears alone."
                )
            names.append(name)
        if not names:
            raise UserError(f"{self.tensors.path} is empty: it is no adapter.")
        return list(dict.fromkeys(names))

    def entries(
        self, name: str, shape: tuple[int, int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Flat positions int64 [e] and offsets [e] of a module in file order, padding included.

        Raises:
            UserError: tensors missing, of another dtype or shape, not finite, or positions outside
                the matrix.
        """
        form, path = self.form, self.tensors.path
        what = f"{name} in {path}"
        values = self.tensors.get(f"{PREFIX}{name}{form.offsets}")
        check_backed(shape, values.numel(), what)
        positions = self.tensors.get(f"{PREFIX}{name}{form.positions}")
        check_values(values, dtype, f"{name}{form.offsets} in {path}")
        expected = form.positions_shape(values.numel())
        if positions.dtype not in INTEGERS or positions.shape != expected:
            raise UserError(
                f"{name}{form.positions} in {path} is {positions.dtype} {tuple(positions.shape)}; "
                f"expected int32 {expected}."
            )
        return form.decode(positions, shape, what), values


def read_peft(
    form: PeftForm, directory: Path, data: dict[str, Any], tensors: TensorFile, base_of: BaseOf
) -> Adapter:
    """An adapter in a form of PEFT's, of leanlift or of PEFT itself.

    Args:
        form: which.
        directory: where it is.
        data: its adapter_config.json.
        tensors: its tensors.
        base_of: is asked where the adapter does not say what its base is.

    Raises:
        UserError: what PEFT could not load either, or a base that nobody knows.
    """
    form.check(directory, data)
    file = _File(form, tensors)
    names = file.names()
    split: Split | None = None
    if (directory / FACTS_NAME).is_file():
        metadata, split = _own_metadata(directory / FACTS_NAME, names)
    else:
        metadata = _metadata_of_peft(form, directory, data, names, base_of)
    dtype = dtype_of(metadata.config.values_dtype)

    def read(name: str) -> LayerOffsets:
        shape, what = metadata.base.shapes[name], f"{name} in {tensors.path}"
        flat, values = file.entries(name, shape, dtype)
        if split is not None:
            return _split_up(flat, values, shape, split[name], what)
        room = form.room(data, shape)
        if values.numel() != room:
            raise UserError(
                f"{what} has {values.numel()} entries, but {room} by its {CONFIG_NAME}: it was "
                "trained over another base, or over a quantized one."
            )
        return LayerOffsets(_added_up(flat, values, shape, what), None)

    return metadata.adapter(directory, form.name, read)


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
    more = {
        "embedding_rows": metadata.grown,
        "task": metadata.task,
        "embedding": metadata.embedding,
    }
    extra = [key for key, value in more.items() if value is not None]
    if extra:
        raise UserError(f"{path} is damaged: PEFT's form has no place for {extra[0]}.")
    assert isinstance(split, dict)
    return metadata, split


def _metadata_of_peft(
    form: PeftForm, directory: Path, data: dict[str, Any], names: list[str], base_of: BaseOf
) -> AdapterMetadata:
    """What is known of an adapter that PEFT itself has trained, from its base.

    Raises:
        UserError: nobody knows the base, or it has not these modules; a budget that cannot be.
    """
    config = form.config(data, tuple(names), directory / CONFIG_NAME)
    base = base_of(names)
    lacking = [name for name in names if name not in base.shapes]
    if lacking:
        raise UserError(
            f"{directory} changes {lacking[0]!r:.120}, but its base has no such Linear in its "
            "blocks: load the adapter's own base."
        )
    return AdapterMetadata(config, base, 0)


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


def _added_up(flat: Tensor, values: Tensor, shape: tuple[int, int], what: str) -> Offsets:
    """Entries in any order; positions that occur twice are added up, as PEFT does."""
    real = ((flat != 0) | (values != 0)).nonzero()  # what stands behind the last one is padding
    kept = int(real[-1]) + 1 if len(real) else 1
    distinct, where = flat[:kept].unique(sorted=True, return_inverse=True)
    total = torch.zeros(distinct.numel()).index_add_(0, where, values[:kept].float())
    check_values(total, torch.float32, what)  # finite numbers can have an infinite sum
    return Offsets.from_flat(distinct, total, shape)


def _split_up(
    flat: Tensor, values: Tensor, shape: tuple[int, int], counts: list[int], what: str
) -> LayerOffsets:
    """Entries in the order in which `write_peft` has them: active, retired, padding."""
    active, retired = counts
    count = active + retired
    if count > flat.numel() or bool(flat[count:].any()) or bool(values[count:].any()):
        raise UserError(
            f"{what} has other entries than the {active} active and {retired} retired ones that "
            f"{FACTS_NAME} speaks of."
        )
    try:
        trained = Offsets.from_flat(flat[:active], values[:active], shape)
        rest = Offsets.from_flat(flat[active:count], values[active:count], shape)
    except ValueError as error:
        raise UserError(f"the positions of {what} are broken: {error}.") from None
    offsets = LayerOffsets(trained, rest if retired else None)
    offsets.check_disjoint(what)
    return offsets
