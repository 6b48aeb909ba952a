"""A checkpoint that transformers holds in 4 or 8 bits by bitsandbytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from leanlift.requantized.checkpoint import Held, device
from leanlift.tiles import RowTiles
from leanlift.training.arguments import RunArguments
from leanlift.training.base import load_model
from leanlift.weights.quantized import WeightFormat, requantize


class Bnb:
    """What transformers holds after it has quantized a checkpoint: its Linears, the head and the
    embedding not among them.

    Args:
        kind: "nf4" (with double quantization) or "int8".
    """

    marks: tuple[str, ...] = (".weight.absmax", ".SCB")

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def check(self, source: Path) -> None:
        """Every base that an adapter is merged onto can be held so."""

    def load(self, place: Path, dtype: str) -> Any:
        args = RunArguments(
            model_name_or_path=str(place),
            load_in_4bit=self.kind == "nf4",
            load_in_8bit=self.kind == "int8",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            dtype=dtype,
        )
        return load_model(args, device(), experts_too=False).eval()

    def save(self, model: Any, output: Path, shards: str) -> None:
        model.save_pretrained(output, max_shard_size=shards)

    def hold(self, tiles: RowTiles, dtype: str) -> Held:
        double = (64, True) if self.kind == "nf4" else ()
        held: Any = requantize(tiles, WeightFormat(self.kind, dtype, *double), device())
        return held  # type: ignore[no-any-return]
