"""SHiRA (sparse high-rank adapters): pairs of positions, one r for all modules.

Per module `shira_indices` (int32 [2, e]: rows, then columns) and `shira_weight` (float [e]), which
PEFT adds to the weight. It wants e = r · (m + n), so shorter lists are padded with zeros at (0, 0);
positions that occur twice are added up. 12 bytes an entry with fp32 offsets, where leanlift's own
form has 5.1. PEFT has it over bases in 16 bits and over bitsandbytes' ones.
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


@dataclass(frozen=True)
class _Shira:
    name: str = "shira"
    words: str = "SHiRA"
    peft_type: str = "SHIRA"
    positions: str = ".shira_indices"
    offsets: str = ".shira_weight"
    holds_quantized: bool = True

    def settings(self, shapes: Shapes, entries: Mapping[str, int]) -> dict[str, Any]:
        """The smallest r whose r · (m + n) holds the entries of every module.

        Raises:
            UserError: a module too small for the r that another one needs.
        """
        needs = {name: -(-entries[name] // sum(shape)) for name, shape in shapes.items()}
        name, r = max(needs.items(), key=lambda item: item[1])
        for other, (m, n) in shapes.items():
            if r * (m + n) > m * n:
                raise UserError(
                    f"{name} has {entries[name]} entries, for which PEFT's SHiRA needs r={r}; it "
                    f"uses one r for all modules, and {other} ({m}x{n}) has room for "
                    f"{m * n // (m + n)} at most: this adapter has no SHiRA form; merge it "
                    "instead, or take Super-Tuning's."
                )
        return {"r": max(1, r), "mask_type": "leanlift"}

    def room(self, settings: Mapping[str, Any], shape: tuple[int, int]) -> int:
        return int(settings["r"]) * sum(shape)

    def positions_shape(self, e: int) -> tuple[int, ...]:
        return (2, e)

    def encode(self, flat: Tensor, shape: tuple[int, int]) -> Tensor:
        return torch.stack([flat // shape[1], flat % shape[1]]).to(torch.int32)

    def decode(self, positions: Tensor, shape: tuple[int, int], what: str) -> Tensor:
        m, n = shape
        rows, columns = positions.long()
        inside = (rows >= 0) & (rows < m) & (columns >= 0) & (columns < n)
        if not bool(inside.all()):
            raise UserError(f"{what} has positions outside its {m}x{n} matrix.")
        return rows * n + columns

    def config(self, data: Mapping[str, Any], names: tuple[str, ...], path: Path) -> LiftConfig:
        rank = data.get("r")
        if type(rank) is not int or rank < 1:
            raise UserError(f"{path} has r={rank!r:.80}; expected 1 or more.")
        return LiftConfig(rank_budget=rank, selector="random", target_modules=names)

    def check(self, directory: Path, data: Mapping[str, Any]) -> None:
        if data.get("fan_in_fan_out"):
            raise UserError(
                f"{directory} is for transposed weights (fan_in_fan_out), which leanlift does not "
                "have."
            )


SHIRA: PeftForm = _Shira()
