"""An adapter that is opened: what it says of itself, and its offsets, matrix by matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from leanlift.adapters.embedding import TrainedEmbedding, all_shapes
from leanlift.adapters.special import SpecialTokens
from leanlift.adapters.task import Task
from leanlift.config import LiftConfig
from leanlift.fingerprint import BaseFingerprint
from leanlift.sparse import LayerOffsets
from leanlift.weights.grown import Grown


@dataclass(frozen=True)
class Adapter:
    """An adapter directory opened for reading.

    Attributes:
        directory: where it is.
        form: "leanlift", or "shira" or "super-tuning" (adapters of PEFT's).
        config: what was trained, and how it was chosen.
        base: the base it belongs to; its `shapes` name the adapter's modules.
        refreshes: mask refreshes it went through.
        special: the special tokens that it was trained with.
        read: gives one module's offsets.
        grown: rows that its embedding has beyond the base's, if any.
        task: what its head is for, if that is new.
        embedding: of which tokens are trained, if any are.
    """

    directory: Path
    form: str
    config: LiftConfig
    base: BaseFingerprint
    refreshes: int
    special: SpecialTokens
    read: Callable[[str], LayerOffsets]
    grown: Grown | None = None
    task: Task | None = None
    embedding: TrainedEmbedding | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Of all that is trained, name -> (m, n): the matrices, and an embedding."""
        return all_shapes(self.base, self.embedding)

    def layer(self, name: str) -> LayerOffsets:
        """The offsets of one module, on the CPU.

        Raises:
            UserError: tensors missing, of wrong type, not finite, or positions that are no sorted
                set inside the matrix.
        """
        return self.read(name)

    def layers(self) -> dict[str, LayerOffsets]:
        """All modules at once: as much memory as the adapter is large."""
        return {name: self.layer(name) for name in self.shapes}
