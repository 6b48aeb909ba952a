"""Checkpoints with experts, for the tests of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from mixtures import MIXTURES, make_mixture


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny checkpoints by the name of their family; not to be changed."""
    place = tmp_path_factory.mktemp("mixtures")
    return {name: make_mixture(config, place / name) for name, config in MIXTURES.items()}
