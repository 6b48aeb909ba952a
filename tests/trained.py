"""A tiny model as a run leaves it: with offsets, some of them retired, and its saved adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import FORMATS, load

from leanlift import LiftConfig, LiftModel, get_lift_model, save_adapter
from leanlift.model import lift_layers, lifted, refresh_mask

KINDS = list(FORMATS)


def trained(base: Path, adapter: Path, kind: str = "nf4+double", **config: Any) -> Any:
    """A model with random offsets, some of them retired, and its saved adapter."""
    model = get_lift_model(load(base, kind), LiftConfig(approx_rank=8, **config), progress=False)
    torch.manual_seed(1)
    for layer in lift_layers(model).values():
        layer.values.data.normal_(std=0.05)
    refresh_mask(model)
    for layer in lift_layers(model).values():
        assert layer.retired_index is not None
        layer.values.data.add_(0.02 * torch.randn_like(layer.values))
    save_adapter(model, adapter)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 43).reshape(2, 20)
    return model(ids).logits.float()


def attached(base: Path, kind: str = "nf4", **config: Any) -> LiftModel:
    model = get_lift_model(load(base, kind), LiftConfig(approx_rank=8, **config), progress=False)
    return model.eval()


def move(model: Any, seed: int = 1) -> None:
    torch.manual_seed(seed)
    for layer in lift_layers(model).values():
        layer.values.data.normal_(std=0.05)


def held(model: Any) -> int:
    """Bytes of all that an attached model holds of its adapters."""
    layers = [m for m in lifted(model).modules() if hasattr(m, "shelf")]
    return sum(slot.nbytes for m in layers for slot in (m.worn, *m.shelf.values())
               if slot.index.count)  # fmt: skip
