"""Is a checkpoint on disk the base of an adapter, and has every trained matrix a place in it?"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from leanlift.adapters import Adapter
from leanlift.errors import UserError
from leanlift.fingerprint import digest_of, other_end, other_matrix, say_what_is_not_known
from leanlift.fingerprint.cells import Cells, dense_cells, entries_of
from leanlift.fingerprint.samples import ENDS, Comparison, Sample, spread
from leanlift.source import SourceTensor, Stored, StoredMatrix, locate, matrix_cells
from leanlift.weights.quantized import dtype_name, dtype_of


def places(adapter: Adapter, tensors: dict[str, Stored]) -> dict[str, str]:
    """Which checkpoint tensor belongs to which Linear of the adapter's base: name -> module.

    Raises:
        UserError: a trained matrix that the checkpoint lacks or has in another shape.
    """
    plan: dict[str, str] = {}
    for module in adapter.base.formats:
        name = locate(f"{module}.weight", tensors)
        if name is None and module in adapter.base.shapes:
            raise UserError(
                f"the base has no tensor {module}.weight, on which {adapter.directory} was "
                "trained: it is another model, or its file layout differs from the loaded model's."
            )
        if name is None:
            continue
        shape = adapter.base.shapes.get(module)
        if shape is not None and tensors[name].shape != shape:
            raise UserError(
                f"{name} of the base is {tensors[name].shape}; the adapter was trained on {shape}: "
                "it is another model."
            )
        tensor = tensors[name]
        if isinstance(tensor, SourceTensor) and not tensor.dtype.is_floating_point:
            raise UserError(
                f"{name} of the base holds {dtype_name(tensor.dtype)} numbers and nothing to read "
                "them by: name the 16-bit checkpoint with --base."
            )
        known = adapter.base.formats[module]
        if isinstance(tensor, StoredMatrix) and tensor.open().format != known:
            raise UserError(
                f"{name} of the base is quantized to {tensor.open().format}; the adapter was "
                f"trained over {known}: name the 16-bit checkpoint with --base."
            )
        plan[name] = module
    return plan


def embedding_of(adapter: Adapter, tensors: dict[str, Stored]) -> Stored | None:
    """The tensor of the base's embedding; None where it is not known."""
    for name in adapter.base.sampled:
        found = locate(name, tensors)
        if found is not None and len(tensors[found].shape) == 2:
            return tensors[found]
    return None


def check_base(
    adapter: Adapter, tensors: dict[str, Stored], plan: dict[str, str], directory: Path
) -> None:
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
    located = {name: locate(name, tensors) for name in base.sampled}
    missing = [name for name, found in located.items() if found is None]
    if missing:
        raise _other_base(adapter, directory, f"has no tensor {missing[0]}")
    ends = {name: tensors[found] for name, found in located.items() if found is not None}
    quantized = [name for name, tensor in ends.items() if isinstance(tensor, StoredMatrix)]
    if quantized:
        raise _other_base(adapter, directory, f"holds {quantized[0]} quantized")

    def read(name: str, rows: int) -> Tensor:
        tensor = ends[name]
        assert isinstance(tensor, SourceTensor)
        return tensor.sample(rows)

    digest = digest_of(base.sampled, read, base.dtype)
    samples = {name: _end_sample(tensor) for name, tensor in ends.items()}
    other = other_end(base, base.sampled, digest, samples, comparison)
    if other is None:
        homes = {module: tensors[name] for name, module in plan.items()}
        dtype = dtype_of(base.dtype)

        def cells(module: str, flat: Tensor) -> Cells:
            return matrix_cells(homes[module], flat, dtype)

        other = other_matrix(base, cells, comparison)
    if other or comparison.is_other:
        raise _other_base(adapter, directory, f"has other weights{f' in {other}' if other else ''}")


def _end_sample(tensor: Stored) -> str:
    assert isinstance(tensor, SourceTensor)
    numel = 1
    for size in tensor.shape:
        numel *= size
    flat = spread(numel, ENDS)
    one_row = len(tensor.shape) == 1
    values = tensor.whole()[flat] if one_row else entries_of(tensor, flat)  # type: ignore[arg-type]
    return Sample(flat, dense_cells(values, tensor.dtype)).encode()


def _other_base(adapter: Adapter, directory: Path, what: str) -> UserError:
    return UserError(
        f"{adapter.directory} was trained on {adapter.base.name}; {directory} {what}: name the "
        "adapter's own base with --base."
    )
