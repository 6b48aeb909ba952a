"""Adding what was learned to a base checkpoint, tensor by tensor.

The result is an ordinary 16- or 32-bit checkpoint that any tool can serve. There are two honest
choices of what to add to:

* `onto="original"`: the 16-bit weights of the base checkpoint plus the offsets. What training
  learned, on weights without quantization error.
* `onto="quantized"`: D(Q) plus the offsets: exactly the model that was trained and measured. Each
  quantized Linear of the base is quantized again as it was at loading; a base that is quantized on
  disk is read as it is stored.

One tensor is in memory at a time, and of the merged ones only row tiles; of those that are stored
transposed, the whole merged one. The output appears under
its name when it is whole.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from leanlift.adapters import Adapter, open_adapter
from leanlift.errors import UserError
from leanlift.export.card import write_card
from leanlift.export.directory import (
    carry_over,
    check_form,
    check_space,
    parse_size,
    resolve_base,
    write_config,
)
from leanlift.export.identity import Part, Places, check_base, embedding_of, places
from leanlift.export.rows import put_vocabulary, with_new_matrices, with_new_rows
from leanlift.export.shared import Shared
from leanlift.export.tokens import put_tokens, trained_tokens, write_tokenizer
from leanlift.io.tensors import ShardedWriter, TensorSpec, new_directory, read_json
from leanlift.source import (
    Rows,
    SourceTensor,
    Stored,
    StoredMatrix,
    by_rows,
    open_checkpoint,
    plain_view,
    turned_rows,
)
from leanlift.tiles import DEFAULT_TILE_BYTES, RowTiles, row_ranges, tile_rows
from leanlift.weights.quantized import dtype_name, dtype_of

logger = logging.getLogger("leanlift")

ONTO = ("original", "quantized")


@dataclass(frozen=True)
class MergeReport:
    """What was written: where, from which base, in which dtype, and how much."""

    output: str
    base: str
    onto: str
    dtype: str
    merged: int
    tensors: int
    nbytes: int


def merge_adapter(
    adapter: str | Path,
    output: str | Path,
    base: str | Path | None = None,
    dtype: str = "float16",
    onto: str = "original",
    max_shard_size: str | int = "5GB",
    progress: bool = True,
    revision: str | None = None,
    check: Callable[[Path], None] | None = None,
    bare: bool = False,
) -> MergeReport:
    """Write base + adapter as a plain checkpoint.

    Args:
        adapter: a directory from `save_adapter` or a training run, or a hub name.
        output: a new directory.
        base: a checkpoint's directory or hub name; by default the one the adapter was trained on.
        dtype: of the merged weights: "float16", "bfloat16" or "float32".
        onto: "original" or "quantized", see above.
        max_shard_size: as in `save_pretrained`.
        progress: whether to show a bar over the tensors.
        revision: of a `base` that is a hub name; by default its main branch. The base that the
            adapter names is taken at the commit that it was trained over.
        check: is called first, with the directory of a base that is not quantized; may raise.
        bare: leave the offsets out: the base as a merge would have it, to compare one with.

    Raises:
        UserError: a damaged adapter, another base, a quantized base checkpoint, a value that
            overflows the dtype, an output that exists. Nothing is left behind then.
    """
    if onto not in ONTO:
        raise UserError(f"expected onto to be one of {ONTO}, got {onto!r}.")
    target, shard_bytes, out = dtype_of(dtype), parse_size(max_shard_size), Path(output)
    with open_adapter(adapter, base=base) as opened:
        named = opened.base.name if base is None else base
        source_dir = resolve_base(named, opened.base.revision if base is None else revision)
        with open_checkpoint(source_dir) as files:
            stored = plain_view(files)
            config = read_json(source_dir / "config.json")
            check_form(config, onto, source_dir)
            if check is not None and "quantization_config" not in config:
                check(source_dir)
            tensors = with_new_matrices(opened, stored)
            check_base(opened, tensors, places(opened, tensors), source_dir)
            kept = kept_in_fp32(stored)
            plan = places(opened, tensors := with_new_rows(opened, tensors))
            specs = _specs(tensors, plan, kept, target)
            check_space(out, nbytes := sum(spec.nbytes for spec in specs))
            shared = Shared.of(opened, plan)
            with new_directory(out) as partial:
                with ShardedWriter(partial, specs, shard_bytes) as writer:
                    for spec in tqdm(specs, desc="Merging", unit="tensor", disable=not progress):
                        exact = onto == "quantized" and spec.name not in kept
                        merge = _Merge(opened, plan, shared, exact, spec.dtype, bare)
                        writer.write(spec.name, merge.pieces(tensors[spec.name]))
                _write_small_files(opened, source_dir, partial, config, dtype, tensors)
                write_card(partial, opened, str(named), dtype, onto, out.name)
        merged = len(plan.matrices.keys() & opened.base.shapes.keys())
    return MergeReport(str(out), str(source_dir), onto, dtype, merged, len(specs), nbytes)


def _specs(
    tensors: Mapping[str, Stored], plan: Places, kept: set[str], target: torch.dtype
) -> list[TensorSpec]:
    """What is written: everything in `target`, but for what keeps its dtype; as a 16-bit
    checkpoint has it, also where a quantized one holds the transpose."""
    specs = []
    for name, t in tensors.items():
        shape = t.shape[::-1] if isinstance(t, StoredMatrix) and plan.turned(name) else t.shape
        specs.append(TensorSpec(name, shape, t.dtype if name in kept else target))
    return specs


def kept_in_fp32(tensors: dict[str, Stored]) -> set[str]:
    """Tensors of a checkpoint that keep their dtype in a merge.

    Integers do, and so do the few in fp32 of a checkpoint in 16 bits: it has them so on purpose
    (the biases by which a router chooses experts, for one). Where fp32 is the rule, all take the
    dtype that is asked for.
    """
    plain = {name: t for name, t in tensors.items() if isinstance(t, SourceTensor)}
    nbytes: dict[torch.dtype, int] = {}
    for tensor in plain.values():
        size = math.prod(tensor.shape) * tensor.dtype.itemsize
        nbytes[tensor.dtype] = nbytes.get(tensor.dtype, 0) + size
    floating = {dtype: size for dtype, size in nbytes.items() if dtype.is_floating_point}
    main = max(floating, key=lambda dtype: floating[dtype], default=torch.float32)
    return {
        name
        for name, tensor in plain.items()
        if not tensor.dtype.is_floating_point or main.itemsize < tensor.dtype.itemsize
    }


def merge_nbytes(largest: int, turned: int = 0) -> int:
    """Bytes of tensors that a merge onto the original takes, from the entries of the largest one,
    and of the largest of those that are stored transposed.

    A row tile in fp32, its cast, and what looking for overflow makes of them; files are mapped.
    What is stored transposed is merged as a whole, in 16 bits. Onto the quantized weights, one
    matrix's quantized form and some tiles of dequantizing it come on top.
    """
    return 4 * min(DEFAULT_TILE_BYTES, 4 * largest) + 2 * turned


def _write_small_files(
    adapter: Adapter,
    source: Path,
    output: Path,
    config: dict[str, Any],
    dtype: str,
    tensors: dict[str, Stored],
) -> None:
    """Everything beside the weights, reconciled: the base's files, the tokenizer that was trained
    with, and configurations that say which tokens were."""
    skipped = carry_over(source, output)
    if skipped:
        logger.warning(
            "Not copied into the merge, being links out of %s: %s.", source, ", ".join(skipped)
        )
    embedding = embedding_of(adapter, tensors)
    rows = None if embedding is None else embedding.shape[0]
    write_tokenizer(source, adapter.directory, output, rows)
    tokens = trained_tokens(adapter.directory, adapter.special)
    if rows is not None and tokens.largest >= rows:
        raise UserError(
            f"{adapter.directory} says that it was trained with a special token {tokens.largest}, "
            f"but the base's embedding has {rows} rows: the adapter is damaged."
        )
    put_tokens(tokens, config, output)
    if adapter.grown is not None:
        put_vocabulary(adapter.grown.rows, config)
    if adapter.task is not None:
        adapter.task.put(config)
    write_config(config, output, dtype)


class _Merge:
    """How one tensor of the base becomes one tensor of the output."""

    def __init__(
        self,
        adapter: Adapter,
        plan: Places,
        shared: Shared,
        quantized: bool,
        dtype: torch.dtype,
        bare: bool = False,
    ) -> None:
        self.adapter = adapter
        self.plan = plan
        self.shared = shared
        self.quantized = quantized
        self.dtype = dtype
        self.learned = () if bare else adapter.shapes

    def pieces(self, tensor: Stored) -> Iterator[Tensor]:
        """Consecutive row pieces of the merged tensor, in the output's dtype."""
        if not isinstance(tensor, StoredMatrix) and (
            not tensor.dtype.is_floating_point or len(tensor.shape) < 2
        ):
            yield _cast(self._as_loaded(tensor.whole(), tensor.name), self.dtype, tensor.name)
            return
        parts = self.plan.parts.get(tensor.name, ())
        if self.plan.turned(tensor.name):
            matrices = tensor.shape[0] if len(tensor.shape) == 3 else 1
            rows = turned_rows(tensor) if isinstance(tensor, SourceTensor) else tensor
            yield from self._turned(rows, parts, matrices)
        else:
            plain = by_rows(tensor) if parts and isinstance(tensor, SourceTensor) else tensor
            yield from self._rows(plain, parts)

    def _turned(
        self, rows: Stored | Rows, parts: Sequence[Part], matrices: int
    ) -> Iterator[Tensor]:
        """Whole matrices whose transposes have the rows of Linears, made by those rows."""
        m, n = rows.shape[0] // matrices, rows.shape[1]
        whole, done = torch.empty(n, m, dtype=self.dtype), 0
        for piece in self._rows(rows, parts):
            while len(piece):
                now, piece = piece[: m - done], piece[m - done :]
                whole[:, done : done + len(now)] = now.T
                done += len(now)
                if done == m:
                    yield whole
                    whole, done = torch.empty(n, m, dtype=self.dtype), 0

    def _rows(self, rows: Stored | Rows, parts: Sequence[Part]) -> Iterator[Tensor]:
        """Consecutive row pieces of a matrix that has the rows of Linears."""
        done = 0
        for part in parts:
            yield from self._plain_pieces(rows, done, part.first)
            yield from self._part_pieces(rows, part)
            done = part.first + part.rows
        yield from self._plain_pieces(rows, done, rows.shape[0])

    def _plain_pieces(self, tensor: Stored | Rows, first: int, last: int) -> Iterator[Tensor]:
        """Rows that belong to no Linear of the adapter's base."""
        if first == last:
            return
        rows: Any = tensor.open() if isinstance(tensor, StoredMatrix) else tensor
        for start, stop in _ranges(tensor, last - first):
            piece = self._as_loaded(rows.rows(first + start, first + stop), tensor.name)
            yield _cast(piece, self.dtype, tensor.name)

    def _part_pieces(self, tensor: Stored | Rows, part: Part) -> Iterator[Tensor]:
        """Rows of a Linear: of its own matrix where that is quantized as a whole."""
        name = part.module
        offsets = self.shared.layers.of(name) if name in self.learned else None
        rows, first, held = cast(RowTiles, tensor), part.first, name in self.adapter.base.formats
        if isinstance(tensor, StoredMatrix):
            rows = tensor.open()
        elif self.quantized and held:
            rows, first = self.shared.quantized.of(name), part.at
        for start, stop in _ranges(tensor, part.rows):
            piece = rows.rows(first + start, first + stop)
            if not held:  # an embedding in 16 bits
                piece = self._as_loaded(piece, tensor.name)
            if offsets is not None:
                piece = piece.to(torch.float32, copy=True)
                offsets.add_to_(piece, part.at + start, part.at + stop)
            yield _cast(piece, self.dtype, tensor.name)

    def _as_loaded(self, piece: Tensor, name: str) -> Tensor:
        """Rounded to the dtype of loading, where the trained model is what is wanted."""
        if self.quantized and piece.is_floating_point():
            return _cast(piece, dtype_of(self.adapter.base.dtype), name)
        return piece


def _ranges(tensor: Stored | Rows, rows: int) -> Iterator[tuple[int, int]]:
    """Row ranges that cover so many rows of a tensor, each a tile of it."""
    width = math.prod(tensor.shape[1:])
    return row_ranges(rows, tile_rows(width, 4))


def _cast(piece: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A piece of tensor `name` in another dtype; integers stay what they are.

    Raises:
        UserError: it is no number, or there is no such number in that dtype.
    """
    if not piece.is_floating_point():
        return piece
    if not bool(piece.isfinite().all()):
        raise UserError(
            f"{name} of the base has NaN or infinite numbers: the checkpoint is damaged; fetch it "
            "again."
        )
    cast = piece.to(dtype)
    if bool(cast.isinf().any()):
        largest, limit = float(piece.abs().max()), torch.finfo(dtype).max
        wider = "bfloat16" if dtype == torch.float16 else "float32"
        raise UserError(
            f"{name} holds {largest:.6g}, more than {dtype_name(dtype)} can ({limit:.6g}): use "
            f"dtype={wider}."
        )
    return cast
