"""Where the tensors of a live model are in its checkpoint.

A merge adds to the checkpoint's own tensors, so every trained matrix needs one of its own there,
of its shape. Some architectures are stored otherwise than they live (fused, split, under other
names): that is found before a run, not after it.
"""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

from leanlift.errors import UserError
from leanlift.fingerprint import BaseFingerprint
from leanlift.source.checkpoint import open_checkpoint
from leanlift.source.stored import plain_view


def locate(name: str, tensors: Container[str]) -> str | None:
    """A tensor by its name in the live model; a bare backbone's checkpoint lacks the prefix."""
    for candidate in (name, name.removeprefix("model."), f"model.{name}"):
        if candidate in tensors:
            return candidate
    return None


def check_homes(base: BaseFingerprint, directory: Path) -> None:
    """Refuse to train what could not be merged.

    Args:
        base: the fingerprint of a live model.
        directory: the checkpoint that it was loaded from; headers alone are read.

    Raises:
        UserError: a trained matrix, or a tensor by which the base is known again, that the
            checkpoint lacks or has in another shape; or a checkpoint that cannot be merged onto.
    """
    with open_checkpoint(directory) as files:
        tensors = plain_view(files)
        for module, shape in base.shapes.items():
            found = locate(f"{module}.weight", tensors)
            if found is None or tensors[found].shape != shape:
                stored = "nothing" if found is None else f"{found} as {tensors[found].shape}"
                raise UserError(
                    f"{module}.weight {shape} could be trained but not merged: {directory} has "
                    f"{stored} in its place. Train the Linears that it has as they are, with "
                    "target_modules."
                )
        for name in base.sampled:
            if locate(name, tensors) is None:
                raise UserError(
                    f"{directory} has no tensor {name}, by which the base would be known again: "
                    "an adapter of this model could not be merged onto it, so name a checkpoint "
                    "that has its tensors under the model's own names."
                )
