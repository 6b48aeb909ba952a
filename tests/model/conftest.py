"""Checkpoints with experts, and deep ones whose blocks come from the host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import config_of
from mixtures import MIXTURES, make_mixture
from tiny import make_checkpoint_of

from leanlift.streaming import Pool


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny checkpoints by the name of their family; not to be changed."""
    place = tmp_path_factory.mktemp("mixtures")
    return {name: make_mixture(config, place / name) for name, config in MIXTURES.items()}


@pytest.fixture(scope="module")
def deep_base(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A checkpoint of a family, of as many blocks as the file of tests has LAYERS."""
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            config = config_of(family, num_hidden_layers=request.module.LAYERS, vocab_size=128)
            made[family] = make_checkpoint_of(config, tmp_path_factory.mktemp("base") / "base")
        return made[family]

    return of


@pytest.fixture
def spoilt_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer's bytes are spoilt the moment that it may be used again."""
    empty = Pool._empty

    def spoilt(self: Pool, buffer: Any) -> None:
        empty(self, buffer)
        buffer.memory.fill_(0xAB)

    monkeypatch.setattr(Pool, "_empty", spoilt)
