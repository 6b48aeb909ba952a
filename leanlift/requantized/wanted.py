"""What is to be written, and what has to be known before anything slow: the adapter, its base, the
rows that both are compared on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from leanlift.adapters import Adapter, open_adapter
from leanlift.errors import UserError
from leanlift.export import MergeReport, merge_adapter
from leanlift.export.directory import resolve_base
from leanlift.requantized.asked import OwnRows, rows_of
from leanlift.source import open_checkpoint, plain_view
from leanlift.training.base import check_loads


@dataclass(frozen=True)
class Wanted:
    """What is to be written.

    Attributes:
        adapter: a directory or a hub name.
        base: the base checkpoint; None: the adapter's own.
        revision: of a base on the hub.
        onto: as for `merge_adapter`.
        dtype: of the merge that is quantized.
        verify: whether what is written is compared with adapter and base.
        data: rows to compare them on.
        progress: whether to show a bar over the tensors of a merge.
    """

    adapter: str | Path
    base: str | Path | None = None
    revision: str | None = None
    onto: str = "original"
    dtype: str = "float16"
    verify: bool = True
    data: str | None = None
    progress: bool = True


@dataclass(frozen=True)
class Known:
    """What is known before anything is written.

    Attributes:
        adapter: opened.
        source: the base's directory.
        weights: numbers in the base.
        rows: to compare on, and by which the prompts are known that were trained; None: nobody says
            which, and nothing is compared.
    """

    adapter: Adapter
    source: Path
    weights: int
    rows: OwnRows | None


@contextmanager
def known(wanted: Wanted) -> Iterator[Known]:
    """Open the adapter, find the base and the rows.

    Raises:
        UserError: one of them is missing or damaged, or the model does not write text.
    """
    with open_adapter(wanted.adapter, base=wanted.base) as adapter:
        if adapter.task is not None:
            raise UserError(
                f"{adapter.directory} is an adapter of a {adapter.task.architecture}: expected one "
                "of a model that writes text; --format merged takes this one."
            )
        rows = _rows(adapter, wanted)
        named = adapter.base.name if wanted.base is None else wanted.base
        revision = adapter.base.revision if wanted.base is None else wanted.revision
        source = resolve_base(named, revision)
        with open_checkpoint(source) as files:
            weights = sum(math.prod(tensor.shape) for tensor in plain_view(files).values())
        yield Known(adapter, source, weights, rows)


def merge(wanted: Wanted, place: Path, bare: bool = False, shards: str = "5GB") -> MergeReport:
    """The merge that is quantized; where it is `bare`, the base alone in the same form."""
    return merge_adapter(
        wanted.adapter,
        place,
        base=wanted.base,
        dtype=wanted.dtype,
        onto=wanted.onto,
        max_shard_size=shards,
        progress=wanted.progress,
        revision=wanted.revision,
        check=None if bare else check_loads,
        bare=bare,
    )


def _rows(adapter: Adapter, wanted: Wanted) -> OwnRows | None:
    try:
        return rows_of(adapter, wanted.data)
    except UserError as error:
        if not wanted.verify:
            return None
        raise UserError(
            f"{str(error).rstrip('.')}; or leave the comparison out with --no_verify."
        ) from None
