"""An adapter to be lied about."""

from __future__ import annotations

import pytest
import torch
from victim import Victim


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Victim:
    torch.manual_seed(0)
    return Victim(tmp_path_factory.mktemp("victim"))
