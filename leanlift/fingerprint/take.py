"""Taking the fingerprint of a stock model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from leanlift.fingerprint.cells import Cells, dense_cells
from leanlift.fingerprint.record import BaseFingerprint
from leanlift.fingerprint.samples import ENDS, Sample, positions, spread
from leanlift.tiles import parts_of_stacks
from leanlift.weights.quantized import FrozenWeight, dtype_name, dtype_of

SAMPLED_ROWS = 64

Read = Callable[[str, Tensor], Cells]
"""Cells of a base's matrix, by module name, at flat positions."""


def fingerprint(
    model: nn.Module,
    weights: Mapping[str, FrozenWeight],
    targets: Sequence[str],
    name: str,
    dtype: torch.dtype,
    revision: str | None = None,
) -> BaseFingerprint:
    """Take the fingerprint of a stock model, before anything is attached to it.

    Args:
        model: the base.
        weights: of the targets, then of all else that is quantized, by module.
        targets: modules to train.
        name, revision: where the model was loaded from.
        dtype: in which.
    """
    sampled = sampled_names(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return BaseFingerprint(
        name=name,
        dtype=dtype_name(dtype),
        shapes={target: weights[target].shape for target in targets},
        formats={path: weight.format for path, weight in weights.items()},
        sampled=sampled,
        digest=digest_of(
            sampled, lambda key, rows: _sample(parameters[key], rows), dtype_name(dtype)
        ),
        samples={key: _sample_end(parameters[key]) for key in sampled},
        revision=revision,
        parts=parts_of_stacks(weights, targets),
    )


def _sample_end(tensor: Tensor) -> str:
    flat = spread(tensor.numel(), ENDS)
    values = tensor.detach().reshape(-1)[flat.to(tensor.device)]
    return Sample(flat, dense_cells(values, tensor.dtype)).encode()


def with_samples(
    base: BaseFingerprint, masks: Mapping[str, Callable[[], Tensor]], read: Read
) -> BaseFingerprint:
    """A fingerprint that knows its trained matrices.

    Args:
        base: without them.
        masks: give the sorted positions that each trains.
        read: gives cells of a target.
    """
    samples = dict(base.samples)
    for name, mask in masks.items():
        m, n = base.shapes[name]
        flat = positions(m * n, mask(), len(masks))
        samples[name] = Sample(flat, read(name, flat)).encode()
    return replace(base, samples=samples)


def digest_of(names: tuple[str, ...], read: Callable[[str, int], Tensor], dtype: str) -> str:
    """sha256 over the sampled rows of the named tensors, rounded to `dtype`.

    Args:
        names: tensors to read.
        read: gives at most that many evenly spaced rows of a tensor (all of a 1-D one).
        dtype: the dtype the base is loaded in.
    """
    digest = hashlib.sha256()
    for name in names:
        rows = read(name, SAMPLED_ROWS).detach().to(dtype_of(dtype)).float().cpu().contiguous()
        digest.update(name.encode())
        digest.update(rows.numpy().tobytes())
    return digest.hexdigest()


def sampled_rows(size: int, rows: int) -> list[int]:
    """Evenly spaced row numbers, at most `rows` of them."""
    return sorted({round(i * (size - 1) / max(1, rows - 1)) for i in range(min(rows, size))})


def sampled_names(model: nn.Module) -> tuple[str, ...]:
    """By which tensors a model is known: all 1-D weights (norms) and the input embedding, sorted.
    What is tied to the embedding is on disk under the embedding's own name, whichever comes first
    in the model."""
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 1 and name.endswith(".weight")
    ]
    get_embedding = getattr(model, "get_input_embeddings", None)
    if get_embedding is not None:
        embedding = get_embedding()
        names += [f"{name}.weight" for name, part in model.named_modules() if part is embedding]
    return tuple(sorted(names))


def _sample(tensor: Tensor, rows: int) -> Tensor:
    if tensor.dim() == 1:
        return tensor
    return tensor[sampled_rows(tensor.shape[0], rows)]
