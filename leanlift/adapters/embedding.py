"""The embedding of which an adapter has trained the rows of some tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from leanlift.errors import UserError
from leanlift.fingerprint import BaseFingerprint
from leanlift.io.bounded import is_module_name, is_shape


@dataclass(frozen=True)
class TrainedEmbedding:
    """An embedding with trained rows.

    Attributes:
        module: its path.
        shape: [V, d], as many rows as it had in training.
    """

    module: str
    shape: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {"module": self.module, "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, data: Any) -> TrainedEmbedding:
        """Back from `to_dict`; `data` may come from a file that anyone has written.

        Raises:
            UserError: a value that none has.
        """
        known = isinstance(data, dict) and set(data) == {"module", "shape"}
        if not known or not is_module_name(data["module"]) or not is_shape(data["shape"]):
            raise UserError(f"expected an embedding and its shape, got {data!r:.80}.")
        m, n = data["shape"]
        return cls(data["module"], (m, n))


def all_shapes(
    base: BaseFingerprint, embedding: TrainedEmbedding | None
) -> dict[str, tuple[int, int]]:
    """Of all that an adapter trains, name -> (m, n): matrices of its base, and an embedding."""
    own = {} if embedding is None else {embedding.module: embedding.shape}
    return {**base.shapes, **own}
