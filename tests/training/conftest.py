"""A run that has ended."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import RESUMED, SAVING
from grown import make_tokens
from runs import trainer_for


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with checkpoints at 2, 4 and 6; not to be changed."""
    output = tmp_path_factory.mktemp("finished") / "run"
    trainer_for(base, output, RESUMED, **SAVING).train()
    return output


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("grown") / "template"
    make_tokens().save_pretrained(path)
    return path
