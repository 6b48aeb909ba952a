"""The cell of a stored number holds every weight that could have been stored so, and few others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import make_linear4bit, make_linear8bit, random_weight

from leanlift.fingerprint.cells import cells_of, dense_cells, entries_of
from leanlift.weights.quantized import frozen_weight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def ids(value: Any) -> str:
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_a_cell_holds_the_weight_that_was_quantized(
    kind: str, dtype: torch.dtype, double: bool
) -> None:
    """Every entry, with outliers and zeros; and cells are no wider than the format makes them."""
    weight = random_weight(96, 128, seed=4)
    weight[::7, ::11] *= 20
    weight[3, :70] = 0
    rounded = weight.to(dtype)
    module = (
        make_linear8bit(96, 128, weight=rounded)
        if kind == "int8"
        else make_linear4bit(96, 128, kind, double, dtype=dtype, weight=rounded)
    )
    flat = torch.arange(weight.numel())
    frozen = frozen_weight(module)
    cells = cells_of(frozen, flat, dtype)
    exact = weight.reshape(-1).double()
    assert bool(((cells.low <= exact) & (exact <= cells.high)).all())
    dequantized = entries_of(frozen, flat).double()
    slack = 1e-2 * dequantized.abs().max()
    assert bool(((cells.low - slack <= dequantized) & (dequantized <= cells.high + slack)).all())
    scale = weight.view(-1, 64).abs().amax(1) if kind != "int8" else weight.abs().amax(1)
    width = (cells.high - cells.low).view(len(scale), -1) / scale.double().unsqueeze(1).clamp(1e-9)
    assert float(width[scale > 0].median()) < {"nf4": 0.2, "fp4": 0.25, "int8": 0.02}[kind]


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_dense_cells_hold_what_was_rounded_and_not_the_next_number(dtype: torch.dtype) -> None:
    exact = random_weight(64, 64).double() * 10.0 ** torch.randint(-8, 3, (64, 64))
    rounded = exact.to(dtype)
    cells = dense_cells(rounded, dtype)
    assert bool(((cells.low <= exact) & (exact <= cells.high)).all())
    following = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    normal = rounded.abs() > torch.finfo(dtype).smallest_normal
    assert not bool(
        cells.agree(dense_cells(following, dtype))[normal & (dtype != torch.float32)].any()
    )
    assert bool(cells.agree(dense_cells(rounded.clone(), dtype)).all())
