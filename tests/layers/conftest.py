"""What a layer rebuilds."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from torch import Tensor

from leanlift.layers import LiftLinear


@pytest.fixture
def rebuilt(monkeypatch: pytest.MonkeyPatch) -> Counter[LiftLinear]:
    """How often each layer has rebuilt its effective weight."""
    calls: Counter[LiftLinear] = Counter()
    original = LiftLinear.effective_rows

    def counted(layer: LiftLinear, first: int, last: int, *rest: Any) -> Tensor:
        calls[layer] += first == 0  # the first tile of all
        return original(layer, first, last, *rest)

    monkeypatch.setattr(LiftLinear, "effective_rows", counted)
    return calls
