"""What every test gets: offline libraries, one thread, fixed seeds, and a CPU: a GPU that is there
is left alone, so that the tests are the same everywhere. `benchmarks/gpu_proof` is for GPUs.

Torch is imported where it is used: the process that hands the tests to others needs none.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["LEANLIFT_PLANS"] = "off"  # no plan is kept in, or taken from, anybody's home

import functools
import gc
import random
import sys
from pathlib import Path

import pytest
from parts import pytest_addoption, pytest_collection_modifyitems

__all__ = ["pytest_addoption", "pytest_collection_modifyitems"]  # pytest looks for them here


def pytest_collection_finish() -> None:
    """What was imported lives as long as the process: no collection need look at it again, of
    which libraries ask for one in every run (a third of a short run's time). And what is installed
    stays so, which accelerate looks up on the disk some twenty times a run."""
    installed = sys.modules.get("accelerate.utils.imports")
    if hasattr(installed, "_is_package_available"):
        installed._is_package_available = functools.cache(installed._is_package_available)
    _stay()


def _stay() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _what_came_since_stays_too() -> None:
    """Such as the libraries' modules that are imported where they are used."""
    if len(gc.get_objects()) > 30_000:
        _stay()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # what is still there at the end is told as leaked by some


@pytest.fixture(autouse=True)
def _seed() -> None:
    import numpy as np
    import torch

    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No picture of a run's memory, a fifth of a short run's time, but for tests that ask for
    `drawn`."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("leanlift.measure.report.draw", lambda *given: None)


@pytest.fixture
def drawn() -> None:
    """Runs draw their memory, as they do for anybody."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in 32 bits, alone in its parent directory; not to be changed."""
    from tiny import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def unplanned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of the command line without a plan: two plans take longer than a short run."""
    monkeypatch.setattr("leanlift.cli.train._plan", lambda *given: None)
