"""What a layer rebuilds."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from leanlift.layers import LiftLinear


@pytest.fixture
def rebuilt(monkeypatch: pytest.MonkeyPatch) -> Counter[LiftLinear]:
    """How often each layer has rebuilt its effective weight."""
    calls: Counter[LiftLinear] = Counter()
    original = LiftLinear.effective_weight

    def counted(layer: LiftLinear, dtype: torch.dtype) -> Tensor:
        calls[layer] += 1
        return original(layer, dtype)

    monkeypatch.setattr(LiftLinear, "effective_weight", counted)
    return calls
