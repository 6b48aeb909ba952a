"""What an adapter holds, in memory: per layer, offsets at positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from leanlift.config import LiftConfig
from leanlift.errors import UserError
from leanlift.fingerprint import BaseFingerprint
from leanlift.grown import Grown
from leanlift.sparse import SegmentedIndex, add_offsets_, find_positions
from leanlift.special import SpecialTokens


@dataclass(frozen=True)
class Store:
    """Offsets at positions: one layer's active or retired entries. `values` is 1-D [k]."""

    index: SegmentedIndex
    values: Tensor

    @property
    def nbytes(self) -> int:
        return self.index.nbytes + self.values.nbytes


@dataclass(frozen=True)
class LayerOffsets:
    """What one layer has learned."""

    active: Store
    retired: Store | None

    @property
    def stores(self) -> tuple[Store, ...]:
        """The active entries, and the retired ones where there are any."""
        return (self.active,) if self.retired is None else (self.active, self.retired)

    @property
    def count(self) -> int:
        """Entries in all."""
        return sum(store.index.count for store in self.stores)

    def check_disjoint(self, what: str) -> None:
        """Refuse entries that are active and retired at once: they would count twice, and a
        refresh could not tell which of the two to keep.

        Raises:
            UserError: there are some; `what` says where.
        """
        if self.retired is None:
            return
        active, retired = self.active.index.to_flat(), self.retired.index.to_flat()
        both = int((find_positions(active, retired) >= 0).sum())
        if both:
            raise UserError(f"{what} has {both} entries that are both active and retired.")

    def add_to_(self, rows: Tensor, start: int, stop: int) -> None:
        """Add all offsets of rows `start:stop` to `rows`, in place."""
        for store in self.stores:
            add_offsets_(rows, store.index, store.values, start, stop)


@dataclass(frozen=True)
class Adapter:
    """An adapter directory opened for reading.

    Attributes:
        directory: where it is.
        form: "leanlift" or "shira" (a PEFT adapter).
        config: what was trained, and how it was chosen.
        base: the base it belongs to; its `shapes` name the adapter's modules.
        refreshes: mask refreshes it went through.
        special: the special tokens that it was trained with.
        read: gives one module's offsets.
        grown: rows that its embedding has beyond the base's, if any.
    """

    directory: Path
    form: str
    config: LiftConfig
    base: BaseFingerprint
    refreshes: int
    special: SpecialTokens
    read: Callable[[str], LayerOffsets]
    grown: Grown | None = None

    def layer(self, name: str) -> LayerOffsets:
        """The offsets of one module, on the CPU.

        Raises:
            UserError: tensors missing, of wrong type, not finite, or positions that are no sorted
                set inside the matrix.
        """
        return self.read(name)

    def layers(self) -> dict[str, LayerOffsets]:
        """All modules at once: as much memory as the adapter is large."""
        return {name: self.layer(name) for name in self.base.shapes}
