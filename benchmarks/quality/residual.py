"""Two ways to have the principal weights exact from step 0 although the base is quantized.

`exact_from_the_start`: the offsets of the selected entries start at W_orig - D(Q).
`taken_out`: the entries are selected on the original and set to zero before the rest is quantized,
so that the scales of their blocks fit what is left; the offsets start at W_orig.

Either way what was learned is the difference to the start: a merge onto the original adds that.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.quality.base import load
from leanlift import LiftConfig
from leanlift.io.tensors import read_json, write_json
from leanlift.model import lift_layers
from leanlift.model.attach import Choice, attach
from leanlift.model.base import stock_base
from leanlift.selection import select
from leanlift.sparse import SegmentedIndex

WEIGHTS = "model.safetensors"


@torch.no_grad()
def exact_from_the_start(model: Any, base: Path) -> dict[str, Tensor]:
    """Set the offsets of an attached model to the residual; returns them by layer."""
    original, starts = load_file(base / WEIGHTS), {}
    for name, layer in lift_layers(model).items():
        flat = layer.index.to_flat()
        wanted = original[f"{name}.weight"].to(flat.device).float().flatten()[flat]
        held = layer.weight_tiles.rows(0, layer.out_features).float().flatten()[flat]
        layer.values.copy_(wanted - held)
        starts[name] = layer.values.detach().clone()
    return starts


def taken_out(
    base: Path, kind: str, config: LiftConfig, device: torch.device
) -> tuple[Any, dict[str, Tensor]]:
    """The model with its principal entries taken out of the quantized base, and its start."""
    dense = load(base, "dense", device)
    tensors, chosen = load_file(base / WEIGHTS), {}
    for name, module in dense.named_modules():
        if f"{name}.weight" in tensors and isinstance(module, torch.nn.Linear):
            if name == "lm_head":
                continue
            count = config.count(tuple(module.weight.shape), name)
            chosen[name] = select(module.weight.detach(), config.scorer(), count)
            tensors[f"{name}.weight"].view(-1)[chosen[name].cpu()] = 0
    with tempfile.TemporaryDirectory() as directory:
        write_json(Path(directory) / "config.json", read_json(base / "config.json"))
        save_file(tensors, Path(directory) / WEIGHTS, metadata={"format": "pt"})
        model = load(Path(directory), kind, device)

    def choose(name: str, weight: Any) -> Choice:
        return Choice(SegmentedIndex.from_flat(chosen[name], weight.shape), converged=True)

    attach(model, config, stock_base(model, list(chosen)), choose, "Attaching", False)
    return model, exact_from_the_start(model, base)


@torch.no_grad()
def onto_original(model: Any, base: Path, starts: dict[str, Tensor], device: torch.device) -> Any:
    """A dense model of the original weights plus what was learned beyond the start."""
    dense = load(base, "dense", device)
    for name, layer in lift_layers(model).items():
        weight = dense.get_submodule(name).weight.data.view(-1)
        weight.index_add_(0, layer.index.to_flat(), layer.values.detach() - starts[name])
    return dense
