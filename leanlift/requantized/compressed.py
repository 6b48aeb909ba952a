"""A checkpoint of compressed-tensors, which vLLM serves: the library's presets that need no rows to
be calibrated on, each weight rounded to the nearest of its grid.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from leanlift.errors import UserError
from leanlift.requantized.checkpoint import Held, device
from leanlift.tiles import RowTiles
from leanlift.weights.quantized import dtype_of

PRESETS = {"fp8": "FP8_DYNAMIC", "w8a16": "W8A16", "w4a16": "W4A16"}
"""Weights in FP8 with a scale a row and activations in FP8 with one a token; weights in INT8 and in
INT4 with a scale for 128 numbers of a row."""


class CompressedTensors:
    """Linears but the head, by a preset of compressed-tensors.

    Args:
        kind: a key of `PRESETS`.

    Raises:
        UserError: the library is not installed.
    """

    marks: tuple[str, ...] = (".weight_scale",)

    def __init__(self, kind: str) -> None:
        self.kind = kind
        try:
            from compressed_tensors.quantization import preset_name_to_scheme
        except ImportError as error:
            raise UserError(
                f"--format ct-{kind} needs compressed-tensors ({error}): pip install "
                '"leanlift[compressed]".'
            ) from None
        self.scheme = preset_name_to_scheme(PRESETS[kind], ["Linear"])

    def check(self, source: Path) -> None:
        """Refuse a model without Linears, or with rows that are no multiple of a group."""
        group = self.scheme.weights.group_size
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        head = model.get_output_embeddings()
        linears = {
            name: module.in_features
            for name, module in model.named_modules()
            if type(module) is nn.Linear and module is not head
        }
        if not linears:
            raise UserError(
                f"{source} has no Linears that compressed-tensors would quantize: use --format "
                "merged or gguf."
            )
        odd = next((name for name, width in linears.items() if group and width % group), None)
        if odd is not None:
            raise UserError(
                f"ct-{self.kind} takes numbers in groups of {group}, and {odd} has rows of "
                f"{linears[odd]}: use ct-fp8, or bnb-nf4."
            )

    def load(self, place: Path, dtype: str) -> Any:
        """A model that rounds weights and activations as the checkpoint will have them."""
        from compressed_tensors.quantization import (
            QuantizationConfig,
            QuantizationStatus,
            apply_quantization_config,
        )

        model = AutoModelForCausalLM.from_pretrained(
            place, dtype=dtype_of(dtype), device_map={"": device()}, trust_remote_code=False
        ).eval()
        head = model.get_output_embeddings()
        config = QuantizationConfig(
            config_groups={"group_0": self.scheme},
            ignore=[name for name, module in model.named_modules() if module is head],
            quantization_status=QuantizationStatus.INITIALIZED,
        )
        apply_quantization_config(model, config, show_progress=False)
        for module in model.modules():
            if getattr(module, "quantization_scheme", None) is not None:
                module.weight_scale.data.copy_(self._scales(module.weight.detach()))
                module.quantization_status = QuantizationStatus.FROZEN
        return model

    def save(self, model: Any, output: Path, shards: str) -> None:
        from compressed_tensors.compressors import ModelCompressor

        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(output, max_shard_size=shards)
        compressor.update_config(str(output))

    def hold(self, tiles: RowTiles, dtype: str) -> Held:
        return _Rounded(tiles, self)

    def _scales(self, weight: Tensor) -> Tensor:
        """Of a weight [m, n], as the library's own observer of extremes has them: a number a row,
        or one for each group of it."""
        from compressed_tensors.quantization.utils import calculate_qparams

        group = self.scheme.weights.group_size or weight.shape[1]
        grouped = weight.float().unflatten(1, (-1, group))
        least, most = grouped.amin(-1), grouped.amax(-1)
        scales: Tensor
        scales, _ = calculate_qparams(least, most, self.scheme.weights)
        return scales


class _Rounded:
    """A matrix, each of whose rows is rounded by itself."""

    def __init__(self, tiles: RowTiles, library: CompressedTensors) -> None:
        self.tiles, self.library = tiles, library

    def rows(self, start: int, stop: int) -> Tensor:
        from compressed_tensors.quantization.lifecycle.forward import fake_quantize

        rows = self.tiles.rows(start, stop)
        scales = self.library._scales(rows).to(rows.dtype)
        none = torch.zeros_like(scales)
        rounded: Tensor = fake_quantize(rows, scales, none, self.library.scheme.weights)
        return rounded
