"""Super-Tuning (arXiv 2607.09287): flat positions, one sparsity for all modules.

Per module `supertuning_indices` (int32 [e], row · n + column) and `supertuning_values` (float [e]),
which PEFT adds to the weight; positions that occur twice are added up. It wants
e = int(m · n · (1 − sparsity)), in its own floating-point arithmetic, so shorter lists are padded
with zeros at position 0. 8 bytes an entry with fp32 offsets. An adapter of one density and without
retired entries needs no padding.

PEFT finds positions by magnitude when it makes a layer, then reads the file's over them; with
`save_precomputed_indices` false the file has none, and nobody but PEFT over the very base can say
what they were. It reads a Linear's weight as plain numbers: over a quantized base it fails. Its
hybrid with a low-rank part ("Supra", r) is no set of offsets at positions. Both are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanlift.adapters.peft.form import PeftForm, Shapes
from leanlift.config import LiftConfig
from leanlift.errors import UserError

SPARSITY = 0.99
"""PEFT's own, where a configuration has none."""

STEP = 2.0**-53
"""The least that 1 - sparsity can change by, in PEFT's arithmetic; at 0 all entries have room."""

MOST_POSITIONS = 2**31
"""Of a matrix, beyond which int32 does not reach."""


@dataclass(frozen=True)
class _SuperTuning:
    name: str = "super-tuning"
    words: str = "Super-Tuning"
    peft_type: str = "SUPERTUNING"
    positions: str = ".supertuning_indices"
    offsets: str = ".supertuning_values"
    holds_quantized: bool = False

    def settings(self, shapes: Shapes, entries: Mapping[str, int]) -> dict[str, Any]:
        """The largest sparsity that leaves room for the entries of every module.

        Raises:
            UserError: a matrix that int32 positions do not reach.
        """
        for name, (m, n) in shapes.items():
            if m * n > MOST_POSITIONS:
                raise UserError(
                    f"{name} is {m}x{n}, more than the 2^31 positions that PEFT's Super-Tuning can "
                    "write down: merge it instead."
                )
        wanted = {name: max(1, entries[name]) for name in shapes}  # PEFT wants one at least
        density = max(wanted[name] / (m * n) for name, (m, n) in shapes.items())
        settings = {"sparsity": 1 - density, "select_top": True, "save_precomputed_indices": True}
        while any(self.room(settings, shape) < wanted[name] for name, shape in shapes.items()):
            settings["sparsity"] = max(0.0, settings["sparsity"] - STEP)
        return settings

    def room(self, settings: Mapping[str, Any], shape: tuple[int, int]) -> int:
        return int(shape[0] * shape[1] * (1 - settings.get("sparsity", SPARSITY)))

    def positions_shape(self, e: int) -> tuple[int, ...]:
        return (e,)

    def encode(self, flat: Tensor, shape: tuple[int, int]) -> Tensor:
        return flat.to(torch.int32)

    def decode(self, positions: Tensor, shape: tuple[int, int], what: str) -> Tensor:
        m, n = shape
        if not bool(((positions >= 0) & (positions < m * n)).all()):
            raise UserError(f"{what} has positions outside its {m}x{n} matrix.")
        return positions.long()

    def config(self, data: Mapping[str, Any], names: tuple[str, ...], path: Path) -> LiftConfig:
        sparsity = data.get("sparsity", SPARSITY)
        if type(sparsity) not in (int, float) or not 0 <= sparsity < 1:
            raise UserError(
                f"{path} has sparsity={sparsity!r:.80}; expected 0 or more and less than 1."
            )
        top = data.get("select_top", True)  # the smallest are chosen by none of ours
        chosen = "magnitude" if top is True else "random"
        return LiftConfig(density=1 - sparsity, selector=chosen, target_modules=names)

    def check(self, directory: Path, data: Mapping[str, Any]) -> None:
        if data.get("r") is not None:
            raise UserError(
                f"{directory} has a low-rank part beside its offsets (r={data['r']!r:.80}), which "
                "leanlift does not have: merge it with PEFT's merge_and_unload instead."
            )
        if not data.get("save_precomputed_indices", True):
            raise UserError(
                f"{directory} does not hold its positions (save_precomputed_indices is false), "
                "which only PEFT over its base can find again: set that to true in its "
                "adapter_config.json, load it with PEFT and save it anew."
            )


SUPERTUNING: PeftForm = _SuperTuning()
