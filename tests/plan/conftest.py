"""The checkpoints of the models that are planned."""

from __future__ import annotations

from pathlib import Path

import pytest
from planned import MODELS
from tiny import make_checkpoint_of


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: make_checkpoint_of(config, tmp_path_factory.mktemp("model"))
        for name, config in MODELS.items()
    }
