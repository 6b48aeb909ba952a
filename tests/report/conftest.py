"""A run's directory and its adapter."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree

import pytest
import torch
from reported import put
from tiny import load, make_checkpoint

from leanlift import LiftConfig, get_lift_model, refresh_mask, save_adapter
from leanlift.model import lift_layers


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Over NF4, with offsets that differ from matrix to matrix, after a refresh, in bfloat16."""
    work = tmp_path_factory.mktemp("report")
    config = LiftConfig(
        density=0.1, approx_rank=4, values_dtype="bfloat16", density_pattern={"down_proj": 0.02}
    )
    model = get_lift_model(load(make_checkpoint(work / "base")), config, progress=False)
    torch.manual_seed(3)
    for number, layer in enumerate(lift_layers(model).values()):
        layer.values.data.normal_(std=0.01 * (number + 1))
    refresh_mask(model)
    save_adapter(model, work / "adapter")
    return work / "adapter"


@pytest.fixture
def run(adapter: Path, tmp_path: Path) -> Path:
    copytree(adapter, tmp_path / "run")
    return put(tmp_path / "run")
