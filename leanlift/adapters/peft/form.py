"""What one form of PEFT's has to say; reading and writing are the same for all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from leanlift.config import LiftConfig

PREFIX = "base_model.model."
"""Before every module's name, in a file of PEFT's."""

Shapes = Mapping[str, tuple[int, int]]


class PeftForm(Protocol):
    """A form."""

    @property
    def name(self) -> str:
        """What it is called in a command."""

    @property
    def words(self) -> str:
        """What it is called in a sentence."""

    @property
    def peft_type(self) -> str:
        """What an adapter_config.json calls it."""

    @property
    def positions(self) -> str:
        """What the tensors of positions are called, after the module's name."""

    @property
    def offsets(self) -> str:
        """What those of offsets are called."""

    @property
    def holds_quantized(self) -> bool:
        """Whether PEFT has it over a quantized base."""

    def settings(self, shapes: Shapes, entries: Mapping[str, int]) -> dict[str, Any]:
        """The keys of an adapter_config.json that give every module room for its entries.

        Raises:
            UserError: there are none such.
        """

    def room(self, settings: Mapping[str, Any], shape: tuple[int, int]) -> int:
        """e, as PEFT computes it from its configuration."""

    def positions_shape(self, e: int) -> tuple[int, ...]:
        """The shape of the positions of e entries."""

    def encode(self, flat: Tensor, shape: tuple[int, int]) -> Tensor:
        """Positions as the file has them, int32, from flat ones int64 [e]."""

    def decode(self, positions: Tensor, shape: tuple[int, int], what: str) -> Tensor:
        """Flat positions int64 [e] from a file's, of the right dtype and shape.

        Raises:
            UserError: some are outside the matrix, which is that of `what`.
        """

    def config(self, data: Mapping[str, Any], names: tuple[str, ...], path: Path) -> LiftConfig:
        """What an adapter that PEFT has trained was told, in leanlift's words.

        Args:
            data: its adapter_config.json.
            names: of its modules.
            path: of that file, for messages.

        Raises:
            UserError: values that PEFT would not take.
        """

    def check(self, directory: Path, data: Mapping[str, Any]) -> None:
        """Refuse what the form may have and leanlift has not.

        Raises:
            UserError: says what.
        """


INTEGERS = (torch.int32, torch.int64)
"""Dtypes of positions that are read; int32 is written, as PEFT writes it."""
