"""Is a checkpoint on disk the base of an adapter, and has every trained matrix a place in it?"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from leanlift.adapters import Adapter
from leanlift.errors import UserError
from leanlift.fingerprint import other_matrix, say_what_is_not_known
from leanlift.fingerprint.cells import Cells
from leanlift.fingerprint.samples import Comparison
from leanlift.source import (
    Stored,
    StoredMatrix,
    find,
    home_of,
    matrix_cells,
    other_stored_end,
)
from leanlift.weights.quantized import dtype_name, dtype_of


@dataclass(frozen=True)
class Part:
    """Rows of a tensor on disk that belong to a Linear of the adapter's base.

    Attributes:
        module: the Linear.
        first, rows: which rows of the tensor on disk, or of its transpose.
        at: the first of them, counted in the Linear's own matrix.
        turned: whether they are the transpose's.
    """

    module: str
    first: int
    rows: int
    at: int
    turned: bool = False


@dataclass(frozen=True)
class Places:
    """Where the Linears of an adapter's base are in a checkpoint.

    Attributes:
        matrices: by module, as the checkpoint holds it.
        parts: by tensor on disk, in the order of its rows.
    """

    matrices: dict[str, Stored]
    parts: dict[str, list[Part]]

    def turned(self, name: str) -> bool:
        """Whether a tensor on disk, or the one of a 16-bit checkpoint in its place, holds the
        transpose of the rows of Linears."""
        return any(part.turned for part in self.parts.get(name, ()))


def places(adapter: Adapter, tensors: dict[str, Stored]) -> Places:
    """Where the Linears of the adapter's base are.

    Raises:
        UserError: a trained matrix that the checkpoint lacks or has in another shape, or two
            matrices in the same rows.
    """
    matrices: dict[str, Stored] = {}
    parts: dict[str, list[Part]] = {}
    for module in dict.fromkeys((*adapter.base.formats, *adapter.shapes)):
        tensor = find(f"{module}.weight", tensors, adapter.base.layout)
        if tensor is None and module in adapter.shapes:
            raise UserError(
                f"the base has no tensor {module}.weight, on which {adapter.directory} was "
                "trained: it is another model, or its file layout differs from the loaded model's."
            )
        if tensor is None:
            continue
        _check_matrix(adapter, module, tensor)
        matrices[module], at = tensor, 0
        for segment in home_of(f"{module}.weight", tensors, adapter.base.layout) or ():
            own = parts.setdefault(segment.name, [])
            own.append(Part(module, segment.first, segment.rows, at, segment.turned))
            at += segment.rows
    for name, own in parts.items():
        own.sort(key=lambda part: part.first)
        for one, two in pairwise(own):
            if one.first + one.rows > two.first or one.turned != two.turned:
                raise UserError(
                    f"{adapter.directory} has {one.module} and {two.module} in the same rows of "
                    f"{name}: the adapter is damaged."
                )
    return Places(matrices, parts)


def _check_matrix(adapter: Adapter, module: str, tensor: Stored) -> None:
    """Whether a tensor can be what the adapter's base had there.

    Raises:
        UserError: it cannot.
    """
    name, shape = tensor.name, adapter.base.shapes.get(module)
    if shape is not None and tensor.shape != shape:
        raise UserError(
            f"{name} of the base is {tensor.shape}; the adapter was trained on {shape}: "
            "it is another model."
        )
    if not isinstance(tensor, StoredMatrix) and not tensor.dtype.is_floating_point:
        raise UserError(
            f"{name} of the base holds {dtype_name(tensor.dtype)} numbers and nothing to read "
            "them by: name the 16-bit checkpoint with --base."
        )
    known = adapter.base.formats.get(module)
    if isinstance(tensor, StoredMatrix) and tensor.open().format != known:
        raise UserError(
            f"{name} of the base is quantized to {tensor.open().format}; the adapter was "
            f"trained over {known}: name the 16-bit checkpoint with --base."
        )


def embedding_of(adapter: Adapter, tensors: dict[str, Stored]) -> Stored | None:
    """The tensor of the base's embedding; None where it is not known."""
    for name in adapter.base.sampled:
        found = find(name, tensors, adapter.base.layout)
        if found is not None and len(found.shape) == 2:
            return found
    return None


def check_base(adapter: Adapter, tensors: dict[str, Stored], plan: Places, directory: Path) -> None:
    """Refuse a checkpoint that is not the adapter's base.

    Args:
        adapter: an opened adapter.
        tensors: the checkpoint's.
        plan: of `places`.
        directory: where the checkpoint is.

    Raises:
        UserError: norms, embedding or trained matrices are not those that were trained over.
    """
    base, comparison = adapter.base, Comparison()
    say_what_is_not_known(base)
    located = {name: find(name, tensors, base.layout) for name in base.sampled}
    missing = [name for name, found in located.items() if found is None]
    if missing:
        raise _other_base(adapter, directory, f"has no tensor {missing[0]}")
    ends = {name: found for name, found in located.items() if found is not None}
    quantized = [name for name, tensor in ends.items() if isinstance(tensor, StoredMatrix)]
    if quantized:
        raise _other_base(adapter, directory, f"holds {quantized[0]} quantized")

    other = other_stored_end(base, ends, comparison)
    if other is None:
        dtype = dtype_of(base.dtype)

        def cells(module: str, flat: Tensor) -> Cells:
            return matrix_cells(plan.matrices[module], flat, dtype)

        other = other_matrix(base, cells, comparison)
    if other or comparison.is_other:
        raise _other_base(adapter, directory, f"has other weights{f' in {other}' if other else ''}")


def _other_base(adapter: Adapter, directory: Path, what: str) -> UserError:
    return UserError(
        f"{adapter.directory} was trained on {adapter.base.name}; {directory} {what}: name the "
        "adapter's own base with --base."
    )
