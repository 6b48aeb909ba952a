"""What an adapter holds, by matrix: entries, where they are, how far they have moved.

For a look at an adapter, not for its use: it is read by numpy, without torch, and not compared
with a base. `leanlift.adapters` is what a merge reads by, and knows PEFT's form too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from leanlift.errors import UserError
from leanlift.io.bounded import LARGEST_SIDE, MOST_OF_A_STRANGER, is_module_name, is_shape
from leanlift.io.files import read_json
from leanlift.io.measured import is_line
from leanlift.io.places import (
    ADAPTER_FORMATS,
    CONFIG_NAME,
    OWN_TYPE,
    RETIRED,
    WEIGHTS_NAME,
    adapter_type,
)
from leanlift.report.tensors import Tensors, open_by_numpy

SEGMENT = 255  # columns; leanlift.sparse.index says why
ANCHOR_ROWS = 64
CHUNK = 2**20


@dataclass(frozen=True)
class Matrix:
    """One matrix of m rows and n columns.

    Attributes:
        module: its name in the model.
        shape: (m, n).
        entries: trained now.
        retired: trained once; their offsets stay.
        mean: mean absolute offset of all of them.
        largest: the largest absolute offset.
        at: row and column of that entry; None where there is no entry.
        norm: root of the sum of squares.
        nbytes: of values and index in memory.
    """

    module: str
    shape: tuple[int, int]
    entries: int
    retired: int
    mean: float
    largest: float
    at: tuple[int, int] | None
    norm: float
    nbytes: int

    @property
    def density(self) -> float:
        """Trained share of the matrix."""
        return self.entries / (self.shape[0] * self.shape[1])


@dataclass(frozen=True)
class AdapterFacts:
    """An adapter: what it says of itself, and its matrices.

    Attributes:
        base: the name of its base.
        dtype: in which the base was loaded.
        formats: storage formats of what is trained or quantized, e.g. ("nf4+double",).
        values_dtype, selector: of its LiftConfig.
        refreshes: that it went through.
        embedding_rows: of an embedding that has grown, else None.
        matrices: in the order of the file.
    """

    base: str
    dtype: str
    formats: tuple[str, ...]
    values_dtype: str
    selector: str
    refreshes: int
    embedding_rows: int | None
    matrices: tuple[Matrix, ...]

    @property
    def entries(self) -> int:
        """Trained entries, of all matrices."""
        return sum(matrix.entries for matrix in self.matrices)

    @property
    def retired(self) -> int:
        """Retired entries, of all matrices."""
        return sum(matrix.retired for matrix in self.matrices)

    @property
    def weights(self) -> int:
        """Weights of the matrices that are trained in part."""
        return sum(matrix.shape[0] * matrix.shape[1] for matrix in self.matrices)


def read_adapter(directory: Path, offsets: bool = True) -> AdapterFacts:
    """Look at an adapter in leanlift's own form.

    Args:
        directory: where it is.
        offsets: whether to read its tensors, seconds for a 7B model's; without them the sizes of
            changes are 0, and only what the header says is known.

    Raises:
        UserError: none, one in another form, or a damaged one.
    """
    path = directory / CONFIG_NAME
    data = read_json(path, MOST_OF_A_STRANGER)
    if adapter_type(data) != OWN_TYPE:
        raise UserError(f"{path} is not of an adapter in leanlift's own form.")
    wrong = _wrong_in(data)
    if wrong:
        raise UserError(f"{path} is damaged: expected {wrong}; fetch it again.")
    base, lift = data["base"], data["lift"]
    shapes = {name: (m, n) for name, (m, n) in base["shapes"].items()}
    if lift.get("trainable_token_indices"):
        shapes[data["embedding"]["module"]] = tuple(data["embedding"]["shape"])
    with open_by_numpy(directory / WEIGHTS_NAME) as tensors:
        _check_names(tensors, shapes)
        read = _matrix if offsets else _counted
        matrices = tuple(read(tensors, name, shape) for name, shape in shapes.items())
    return AdapterFacts(
        base["name"],
        base["dtype"],
        tuple(sorted(set(map(_format, base["formats"].values())))),
        lift.get("values_dtype", "float32"),
        lift.get("selector", "principal"),
        data.get("refreshes", 0),
        data.get("embedding_rows"),
        matrices,
    )


def _check_names(tensors: Tensors, shapes: dict[str, tuple[int, int]]) -> None:
    parts = ("values", "index.columns", "index.counts")
    known = {f"{name}{kind}.{part}" for name in shapes for kind in ("", RETIRED) for part in parts}
    strange = next((name for name in tensors.specs if name not in known), None)
    if strange is not None:
        raise UserError(
            f"{tensors.path} holds {strange!r:.120}, which {CONFIG_NAME} does not speak of: the "
            "two files do not belong together."
        )


def _wrong_in(data: dict[str, Any]) -> str | None:
    """What the configuration, which anyone may have written, does not have as it should."""
    base, lift, rows = data.get("base"), data.get("lift"), data.get("embedding_rows")
    if not isinstance(base, dict) or not isinstance(lift, dict):
        return "a base and a LiftConfig"
    shapes, formats = base.get("shapes"), base.get("formats")
    version, refreshes = data.get("format_version"), data.get("refreshes", 0)
    embedding = data.get("embedding")
    tests: dict[str, Callable[[], bool]] = {
        f"adapter format {ADAPTER_FORMATS[0]} to {ADAPTER_FORMATS[-1]}": lambda: (
            type(version) is int and version in ADAPTER_FORMATS
        ),
        "a count of refreshes": lambda: type(refreshes) is int and 0 <= refreshes < 2**40,
        "the name and dtype of the base": lambda: (
            is_line(base.get("name")) and is_line(base.get("dtype"))
        ),
        "shapes of trained matrices": lambda: (
            isinstance(shapes, dict)
            and len(shapes) > 0
            and all(is_module_name(name) and is_shape(shape) for name, shape in shapes.items())
        ),
        "formats of matrices": lambda: (
            isinstance(formats, dict)
            and set(shapes or ()) <= set(formats)
            and all(map(_is_format, formats.values()))
        ),
        "values_dtype and selector as words": lambda: all(
            is_line(lift.get(key, "")) for key in ("values_dtype", "selector")
        ),
        "an embedding of which tokens are trained, and its shape": lambda: (
            not lift.get("trainable_token_indices")
            or (
                isinstance(embedding, dict)
                and is_module_name(embedding.get("module"))
                and is_shape(embedding.get("shape"))
            )
        ),
        "embedding_rows as a number": lambda: (
            rows is None or (type(rows) is int and 0 < rows <= LARGEST_SIDE)
        ),
    }
    return next((what for what, holds in tests.items() if not holds()), None)


def _is_format(data: Any) -> bool:
    return (
        isinstance(data, dict)
        and is_line(data.get("kind"))
        and is_line(data.get("dtype"))
        and type(data.get("blocksize")) is int
        and type(data.get("double")) is bool
    )


def _format(data: dict[str, Any]) -> str:
    """As `leanlift.weights.quantized.WeightFormat` writes itself."""
    if data["kind"] == "dense":
        return str(data["dtype"])
    block = f"/{data['blocksize']}" if data["blocksize"] not in (0, 64) else ""
    return f"{data['kind']}{block}{'+double' if data['double'] else ''}"


def _matrix(tensors: Tensors, name: str, shape: tuple[int, int]) -> Matrix:
    stores = [_Store(tensors, name, shape)]
    if f"{name}{RETIRED}.values" in tensors.specs:
        stores.append(_Store(tensors, name + RETIRED, shape))
    count = sum(store.count for store in stores)
    top = max(stores, key=lambda store: store.largest)
    return Matrix(
        name,
        shape,
        entries=stores[0].count,
        retired=count - stores[0].count,
        mean=sum(store.total for store in stores) / count if count else 0.0,
        largest=top.largest,
        at=top.at,
        norm=sum(store.squares for store in stores) ** 0.5,
        nbytes=sum(store.nbytes for store in stores),
    )


def _counted(tensors: Tensors, name: str, shape: tuple[int, int]) -> Matrix:
    """A matrix by the header alone."""
    entries = tensors.count_of(f"{name}.values")
    key = f"{name}{RETIRED}.values"
    retired = tensors.count_of(key) if key in tensors.specs else 0
    return Matrix(name, shape, entries, retired, 0.0, 0.0, None, 0.0, 0)


class _Store:
    """Sums over the offsets of one index, which is checked on the way."""

    def __init__(self, tensors: Tensors, name: str, shape: tuple[int, int]) -> None:
        values = tensors.floats(f"{name}.values")
        columns, counts = (
            tensors.bytes_of(f"{name}.index.{part}") for part in ("columns", "counts")
        )
        wrong = _wrong_index(columns, counts, shape, values.size)
        if wrong:
            raise UserError(f"the index of {name} in {tensors.path} is broken: {wrong}.")
        self.count = values.size
        by_row = 4 * shape[0] + 8 * (-(-shape[0] // ANCHOR_ROWS) + 1)  # made when it is loaded
        stored = tensors.specs[f"{name}.values"].nbytes
        self.nbytes = stored + columns.nbytes + counts.nbytes + by_row
        self.total = self.squares = self.largest = 0.0
        self.at: tuple[int, int] | None = None
        for start in range(0, values.size, CHUNK):
            sizes = np.abs(values[start : start + CHUNK]).astype(np.float64)
            self.total += float(sizes.sum())
            self.squares += float(np.square(sizes).sum())
            first = int(sizes.argmax())
            if self.at is None or sizes[first] > self.largest:
                self.largest = float(sizes[first])
                self.at = _position(columns, counts, start + first)


def _wrong_index(
    columns: np.ndarray, counts: np.ndarray, shape: tuple[int, int], values: int
) -> str | None:
    """What keeps the two tensors from being a sorted set of positions inside the matrix."""
    m, n = shape
    segments = -(-n // SEGMENT)
    if columns.ndim != 1 or counts.shape != (m, segments):
        return f"expected counts as [{m}, {segments}] and columns in a row"
    total = int(counts.sum(dtype=np.int64))
    if not total == columns.size == values:
        return f"counts say {total} entries, there are {columns.size} columns, {values} values"
    if not total:
        return None
    flat = counts.reshape(-1).astype(np.int64)
    starts = np.cumsum(flat) - flat
    rises = np.diff(columns.astype(np.int16)) > 0
    rises[starts[(flat > 0) & (starts > 0)] - 1] = True  # a segment begins: any column may
    if not rises.all():
        return "the positions are not sorted or not distinct"
    last = np.zeros((m, segments), dtype=bool)
    last[:, -1] = True
    limit = np.where(last.reshape(-1), n - (segments - 1) * SEGMENT, SEGMENT)
    used = flat > 0
    highest = columns[starts[used] + flat[used] - 1]  # sorted: the last one of each segment
    return None if (highest < limit[used]).all() else "a column lies outside its segment"


def _position(columns: np.ndarray, counts: np.ndarray, entry: int) -> tuple[int, int]:
    """Row and column of an entry by its number."""
    ends = np.cumsum(counts.reshape(-1), dtype=np.int64)
    segment = int(np.searchsorted(ends, entry, side="right"))
    row, part = divmod(segment, counts.shape[1])
    return row, part * SEGMENT + int(columns[entry])
