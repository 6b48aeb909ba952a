"""A base, an adapter and the rows that they are asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from asked import ROWS
from tiny import load, make_checkpoint

from leanlift import LiftConfig, get_lift_model, save_adapter
from leanlift.model import lift_layers


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("eval") / "base", dtype=torch.float16)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = get_lift_model(load(base), LiftConfig(density=0.1, approx_rank=4), progress=False)
    torch.manual_seed(1)
    for layer in lift_layers(model).values():
        layer.values.data.normal_(std=0.05)
    directory = tmp_path_factory.mktemp("eval") / "adapter"
    save_adapter(model, directory)
    return directory
