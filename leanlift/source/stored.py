"""A checkpoint that is quantized on disk, seen as one of plain tensors.

What bitsandbytes holds as a 4-bit matrix is several tensors of a checkpoint (packed codes, scales,
tables, a description), an INT8 one is two, and so is a stack of experts in MXFP4. Here each is one
matrix, or stack, that is read by rows, so that a merge onto it needs no other form of the base.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from leanlift.errors import UserError, first_line
from leanlift.source import mxfp4
from leanlift.source.checkpoint import SourceTensor
from leanlift.source.joined import JoinedRows
from leanlift.weights.quantized import FrozenWeight
from leanlift.weights.stored import STORED_PARTS, STORED_STATE, stored_shape, stored_weight

SCALES, LAYOUT = ".SCB", ".weight_format"
WEIGHT = ".weight"


@dataclass(frozen=True)
class StoredMatrix:
    """A quantized matrix of a checkpoint.

    Attributes:
        name: of its tensor, e.g. "model.layers.0.mlp.up_proj.weight".
        shape: m x n.
        open: reads its stored form, as large as that is, and gives D(Q) by rows.
    """

    name: str
    shape: tuple[int, int]
    open: Callable[[], FrozenWeight]
    dtype: torch.dtype = torch.float32


Stored = SourceTensor | StoredMatrix | JoinedRows


def plain_view(tensors: dict[str, SourceTensor]) -> dict[str, Stored]:
    """The tensors of a checkpoint, with each quantized matrix as one of them, in file order.

    Raises:
        UserError: a quantized matrix that is not whole.
    """
    parts: set[str] = set()
    matrices: dict[str, Stored] = {}
    for name in tensors:
        state = next((s for s in STORED_STATE if name.endswith(f"{WEIGHT}.{s}")), None)
        if state is not None:
            weight = name.removesuffix(f".{state}")
            held = {part: f"{weight}.{part}" for part in STORED_PARTS}
            held = {part: key for part, key in held.items() if key in tensors}
            matrices[weight] = _four_bit(tensors, weight, held, state)
            parts.update(held.values())
        elif name.endswith(SCALES) and (module := name.removesuffix(SCALES)) + WEIGHT in tensors:
            matrices[module + WEIGHT] = _eight_bit(tensors, module)
            parts.update((name, module + LAYOUT))
        elif name.endswith(mxfp4.BLOCKS) and tensors[name].dtype == torch.uint8:
            scales = name.removesuffix(mxfp4.BLOCKS) + mxfp4.SCALES
            if scales in tensors:
                matrices[name] = mxfp4.Mxfp4Stack.of(tensors[name], tensors[scales])
                parts.add(scales)
    found = (matrices.get(name, tensor) for name, tensor in tensors.items() if name not in parts)
    return {tensor.name: tensor for tensor in found}


def _four_bit(
    tensors: dict[str, SourceTensor], weight: str, parts: dict[str, str], state: str
) -> StoredMatrix:
    def read() -> FrozenWeight:
        held = {part: tensors[key].whole() for part, key in parts.items()}
        return stored_weight(tensors[weight].whole(), held)

    try:
        if weight not in tensors:
            raise KeyError(weight)
        shape = stored_shape(tensors[parts[state]].whole())
        return StoredMatrix(weight, shape, _guarded(weight, read))
    except (KeyError, ValueError, AttributeError, UnicodeDecodeError) as error:
        raise _damaged(weight, error) from None


def _eight_bit(tensors: dict[str, SourceTensor], module: str) -> StoredMatrix:
    codes, scales = tensors[module + WEIGHT], tensors[module + SCALES]
    if codes.dtype != torch.int8 or len(codes.shape) != 2 or scales.shape != codes.shape[:1]:
        raise _damaged(module + WEIGHT, ValueError("codes and scales do not fit each other"))

    def read() -> FrozenWeight:
        return stored_weight(codes.whole(), {"SCB": scales.whole()})

    m, n = codes.shape
    return StoredMatrix(module + WEIGHT, (m, n), _guarded(module + WEIGHT, read))


def _guarded(name: str, read: Callable[[], FrozenWeight]) -> Callable[[], FrozenWeight]:
    def guarded() -> FrozenWeight:
        try:
            return read()
        except (KeyError, ValueError, AssertionError, RuntimeError, TypeError) as error:
            raise _damaged(name, error) from None

    return guarded


def _damaged(name: str, error: Exception) -> UserError:
    return UserError(
        f"{name} of the base is quantized, but not whole ({first_line(error).rstrip('.')}): fetch "
        "the checkpoint again."
    )
