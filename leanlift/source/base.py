"""The fingerprint of a base from its checkpoint alone, for an adapter that says nothing of it.

An adapter that PEFT has trained names its base, and no more. What a live model would say of itself
is read from the files instead, with the names that transformers would give their tensors; the base
is taken to have been loaded as it is stored, in the dtype that its configuration names.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leanlift.errors import UserError
from leanlift.fingerprint import BaseFingerprint, Layout, digest_of, sampled_names, with_samples
from leanlift.fingerprint.cells import Cells
from leanlift.source.checkpoint import SourceTensor, open_checkpoint
from leanlift.source.conversion import layout_of
from leanlift.source.empty import empty_model
from leanlift.source.homes import find, matrix_cells, stored_end_sample
from leanlift.source.joined import JoinedRows
from leanlift.source.stored import Stored, StoredMatrix, plain_view
from leanlift.weights.quantized import WeightFormat, dtype_of


def stored_base(
    directory: Path, name: str, modules: Sequence[str], revision: str | None = None
) -> BaseFingerprint:
    """The fingerprint of a checkpoint as a base of which these Linears are trained.

    Args:
        directory: of the checkpoint.
        name, revision: what it is called.
        modules: those of them that are no Linears, or have no tensor, are left out.

    Raises:
        UserError: transformers cannot make the model, or tensors by which it is known lack.
    """
    model, dtype = empty_model(directory, modules)
    head = model.get_output_embeddings()
    with open_checkpoint(directory) as files:
        tensors = plain_view(files)
        sampled = sampled_names(model)
        layout = _layout(model, tensors, sampled)
        ends = {key: _end(find(key, tensors, layout), key, directory) for key in sampled}
        homes = {
            path: tensor
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
            and (tensor := find(f"{path}.weight", tensors, layout)) is not None
            and tensor.shape == tuple(module.weight.shape)
        }  # fmt: skip
        trained = [path for path in homes if path in set(modules)]
        formats = {path: _format(homes[path], dtype) for path in trained}
        formats |= {
            path: tensor.open().format
            for path, tensor in homes.items()
            if isinstance(tensor, StoredMatrix) and path not in formats
        }
        facts = BaseFingerprint(
            name=name,
            dtype=dtype,
            shapes={path: (homes[path].shape[0], homes[path].shape[1]) for path in trained},
            formats=formats,
            sampled=sampled,
            digest=digest_of(sampled, lambda key, rows: ends[key].sample(rows), dtype),
            samples={key: stored_end_sample(tensor) for key, tensor in ends.items()},
            revision=revision,
        )

        def cells(path: str, flat: Tensor) -> Cells:
            return matrix_cells(homes[path], flat, dtype_of(dtype))

        none = partial(torch.empty, 0, dtype=torch.int64)
        facts = with_samples(facts, dict.fromkeys(trained, none), cells)
    heads = [path for path, module in model.named_modules() if module is head]
    known = {f"{path}.weight" for path in (*formats, *heads)}
    return replace(facts, layout=layout.of({*known, *sampled}))


def _layout(model: Any, tensors: dict[str, Stored], sampled: Collection[str]) -> Layout:
    """Where the model's tensors lie; of sampled ones that are not there, what they are tied to."""
    disk = {key: tensor.shape for key, tensor in tensors.items()}
    live = {key: tuple(tensor.shape) for key, tensor in model.state_dict(keep_vars=True).items()}
    layout = layout_of(model, disk, live)
    twins: dict[int, list[str]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        twins.setdefault(id(parameter), []).append(key)
    names = dict(layout.names)
    for keys in twins.values():
        found = {key: find(key, tensors, layout) for key in keys}
        stored = next((tensor for tensor in found.values() if tensor is not None), None)
        if stored is not None:
            lacking = (key for key in keys if key in sampled and found[key] is None)
            names |= dict.fromkeys(lacking, stored.name)
    return replace(layout, names=names)


def _end(tensor: Stored | None, key: str, directory: Path) -> SourceTensor | JoinedRows:
    """A norm or the embedding, in plain numbers.

    Raises:
        UserError: it is not there, or quantized.
    """
    if tensor is None or isinstance(tensor, StoredMatrix):
        raise UserError(
            f"{directory} has no tensor {key} in plain numbers, by which it would be known as a "
            "base: load it yourself, then load_adapter(model, ...)."
        )
    return tensor


def _format(tensor: Stored, dtype: str) -> WeightFormat:
    if isinstance(tensor, StoredMatrix):
        return tensor.open().format
    return WeightFormat("dense", dtype)
