"""The checkpoints of the models that are planned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from planned import MODELS
from tiny import make_tokenizer
from transformers import (
    AutoModelForCausalLM,
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = {}
    for name, config in MODELS.items():
        path = paths[name] = tmp_path_factory.mktemp("model")
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
        make_tokenizer().save_pretrained(path)
    return paths
