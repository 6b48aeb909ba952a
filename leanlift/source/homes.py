"""Where the tensors of a live model are in its checkpoint.

A merge adds to the checkpoint's own tensors, so every trained matrix needs one of its own there,
of its shape. Some architectures are stored otherwise than they live (fused, split, under other
names): that is found before a run, not after it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from leanlift.errors import UserError
from leanlift.fingerprint import (
    BaseFingerprint,
    Home,
    Layout,
    Read,
    Segment,
    digest_of,
    other_end,
)
from leanlift.fingerprint.cells import Cells, cells_of, dense_cells, entries_of
from leanlift.fingerprint.samples import ENDS, Comparison, Sample, spread
from leanlift.source.checkpoint import open_checkpoint
from leanlift.source.joined import JoinedRows
from leanlift.source.stored import Stored, StoredMatrix, plain_view

HERE = Layout()
"""Everything lies under its own name."""


def find(name: str, tensors: Mapping[str, Stored], layout: Layout = HERE) -> Stored | None:
    """A tensor of the model as its checkpoint holds it; None where it is not there, or not as the
    layout says. A bare backbone's checkpoint lacks the prefix."""
    home = layout.homes.get(name)
    if home is not None:
        quantized = tensors.get(home[0].name)
        if home[0].turned and isinstance(quantized, StoredMatrix):  # which is as it lives
            return quantized
        return JoinedRows.of(name, home, tensors)
    known = (layout.names.get(name, name), name, name.removeprefix("model."), f"model.{name}")
    return next((tensors[key] for key in known if key in tensors), None)


def home_of(name: str, tensors: Mapping[str, Stored], layout: Layout = HERE) -> Home | None:
    """Which rows on disk a tensor of the model is; None where it is not there."""
    found = find(name, tensors, layout)
    if found is None or isinstance(found, JoinedRows):
        return None if found is None else found.home
    turned = layout.is_turned(name.removesuffix(".weight"))
    return (Segment(found.name, 0, found.shape[0], turned),)


@contextmanager
def stored_cells(directory: Path, dtype: torch.dtype, layout: Layout) -> Iterator[Read]:
    """Cells of the matrices of a checkpoint, as precise as it holds them.

    Args:
        directory: of the checkpoint; every matrix that is asked for has a home there.
        dtype: in which it is loaded.
        layout: where its tensors are.
    """
    with open_checkpoint(directory) as files:
        tensors = plain_view(files)

        def read(module: str, flat: Tensor) -> Cells:
            found = find(f"{module}.weight", tensors, layout)
            assert found is not None
            return matrix_cells(found, flat, dtype)

        yield read


def matrix_cells(tensor: Stored, flat: Tensor, dtype: torch.dtype) -> Cells:
    """Cells of a matrix of a checkpoint that is loaded in `dtype`."""
    if isinstance(tensor, StoredMatrix):
        return cells_of(tensor.open(), flat, dtype)
    return dense_cells(entries_of(tensor, flat), tensor.dtype)  # type: ignore[arg-type]


def check_homes(base: BaseFingerprint, directory: Path) -> None:
    """Refuse to train what could not be merged.

    Args:
        base: the fingerprint of a live model.
        directory: the checkpoint that it was loaded from; headers alone are read.

    Raises:
        UserError: a trained matrix, or a tensor by which the base is known again, that the
            checkpoint lacks or has in another shape or with other numbers; or a checkpoint that
            cannot be merged onto.
    """
    check_matrix_homes(base.stored, directory, base.layout)
    with open_checkpoint(directory) as files:
        tensors = plain_view(files)
        for name in base.sampled:
            if find(name, tensors, base.layout) is None:
                raise UserError(
                    f"{directory} has no tensor {name}, by which the base would be known again: "
                    "an adapter of this model could not be merged onto it, so name a checkpoint "
                    "that has its tensors under the model's own names."
                )
        located = {name: find(name, tensors, base.layout) for name in base.sampled}
        ends = {name: found for name, found in located.items() if found is not None}
        whole = not any(isinstance(found, StoredMatrix) for found in ends.values())
        other = other_stored_end(base, ends, Comparison()) if whole else None
        if other is not None:
            raise UserError(
                f"the model has other numbers in {other} than {directory}, from which it was "
                "loaded: an adapter of it could not be merged. Save the model as it is with "
                "save_pretrained, and load that."
            )


def other_stored_end(
    base: BaseFingerprint, ends: Mapping[str, Stored], comparison: Comparison
) -> str | None:
    """The norm or embedding in which a checkpoint is another base; None: it is in none of them.

    Args:
        base: the fingerprint.
        ends: its sampled tensors by name, as the checkpoint holds them.
        comparison: counts cells.
    """

    def read(name: str, rows: int) -> Tensor:
        tensor = ends[name]
        assert not isinstance(tensor, StoredMatrix)
        return tensor.sample(rows)

    digest = digest_of(base.sampled, read, base.dtype)
    samples = {name: stored_end_sample(tensor) for name, tensor in ends.items()}
    return other_end(base, base.sampled, digest, samples, comparison)


def stored_end_sample(tensor: Stored) -> str:
    """The sample of a norm or an embedding, as `BaseFingerprint.samples` has it."""
    assert not isinstance(tensor, StoredMatrix)
    flat = spread(math.prod(tensor.shape), ENDS)
    one_row = len(tensor.shape) == 1
    values = tensor.whole()[flat] if one_row else entries_of(tensor, flat)  # type: ignore[arg-type]
    return Sample(flat, dense_cells(values, tensor.dtype)).encode()


def check_matrix_homes(
    shapes: Mapping[str, tuple[int, int]], directory: Path, layout: Layout = HERE
) -> None:
    """Refuse to train a matrix that could not be merged; headers alone are read.

    Args:
        shapes: of the matrices that are trained, by the names of their modules.
        directory: the checkpoint.
        layout: where its tensors are.

    Raises:
        UserError: it lacks one, or has it in another shape.
    """
    with open_checkpoint(directory) as files:
        tensors = plain_view(files)
        for module, shape in shapes.items():
            found = find(f"{module}.weight", tensors, layout)
            if found is None or found.shape != shape:
                stored = "nothing" if found is None else f"{found.name} as {found.shape}"
                raise UserError(
                    f"{module}.weight {shape} could be trained but not merged: {directory} has "
                    f"{stored} in its place. Train the Linears that it has as they are, with "
                    "target_modules."
                )
