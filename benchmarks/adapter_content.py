"""What a load of an adapter must hold, by a plain reading of its file; used by `fuzz_adapter`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks.tensor_bytes import arrays
from leanlift.sparse import LayerOffsets, Offsets, SegmentedIndex


class InvalidContentError(Exception):
    """A load that should have been a refusal."""


def decode(index: SegmentedIndex) -> Any:
    """Positions of an index by the definition of the encoding: int64 [k]."""
    (m, n), counts, columns = index.shape, index.counts.numpy(), index.columns.numpy()
    segments = -(-n // 255)
    if counts.shape != (m, segments) or int(counts.sum(dtype=np.int64)) != columns.size:
        raise InvalidContentError(f"counts {counts.shape} for {columns.size} columns in {m}x{n}")
    segment = np.repeat(np.arange(m * segments), counts.reshape(-1))
    column = segment % segments * 255 + columns
    if (column >= n).any():
        raise InvalidContentError("a column outside the matrix")
    return segment // segments * n + column


def check_store(store: Offsets) -> Any:
    """Positions of a store that holds what it should."""
    flat, values = decode(store.index), store.values.detach().float().numpy()
    if (np.diff(flat) <= 0).any() or flat.size != values.size:
        raise InvalidContentError("positions not sorted, not distinct, or not as many as offsets")
    if not np.isfinite(values).all():
        raise InvalidContentError("offsets that are not finite")
    if not np.array_equal(flat, store.index.to_flat().numpy()):
        raise InvalidContentError("leanlift decodes other positions")
    return flat


def check_layer(offsets: LayerOffsets, expected: Any) -> None:
    """A layer's stores, against each other and against what the file says.

    Args:
        offsets: what was loaded.
        expected: fp32 [m, n], what a plain reading of the file adds to the weight.
    """
    flats = [check_store(store) for store in offsets.stores]
    if len(np.unique(np.concatenate(flats))) != sum(flat.size for flat in flats):
        raise InvalidContentError("entries both active and retired")
    m, n = offsets.active.index.shape
    dense = np.zeros(m * n, np.float32)
    for flat, store in zip(flats, offsets.stores, strict=True):
        dense[flat] += store.values.detach().float().numpy()
    tolerance = 2**-8 if offsets.active.values.dtype != torch.float32 else 1e-6
    if not np.allclose(dense.reshape(m, n), expected, rtol=tolerance, atol=0):
        raise InvalidContentError("another matrix than a plain reading of the file gives")


def plain_reading(tensor_file: bytes, shapes: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """What the tensor file adds to each weight, read by the format's description alone."""

    def floats(name: str) -> Any:
        dtype, array = tensors[name]
        if dtype == "BF16":
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(np.float32)

    tensors = arrays(tensor_file)
    strange = [key for key in tensors if not any(f"{name}." in key for name in shapes)]
    if strange:
        raise InvalidContentError(f"{strange[0]!r:.80} belongs to no module, and was left out")
    dense = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    for name, (_, n) in shapes.items():
        if f"base_model.model.{name}.shira_weight" in tensors:
            rows, columns = tensors[f"base_model.model.{name}.shira_indices"][1]
            weight = floats(f"base_model.model.{name}.shira_weight")
            np.add.at(dense[name], (rows, columns), weight)
            continue
        if f"base_model.model.{name}.supertuning_values" in tensors:
            flat = tensors[f"base_model.model.{name}.supertuning_indices"][1]
            values = floats(f"base_model.model.{name}.supertuning_values")
            np.add.at(dense[name].reshape(-1), flat, values)
            continue
        for prefix in (name, f"{name}.settled"):
            if f"{prefix}.values" in tensors:
                counts = tensors[f"{prefix}.index.counts"][1]
                segment = np.repeat(np.arange(counts.size), counts.reshape(-1))
                rows, part = np.divmod(segment, -(-n // 255))
                columns = part * 255 + tensors[f"{prefix}.index.columns"][1]
                np.add.at(dense[name], (rows, columns), floats(f"{prefix}.values"))
    return dense
