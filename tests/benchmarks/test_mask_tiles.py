"""What of a mask has to be formed: counted by tiles, against a plain count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from masks import MASKS
from safetensors.torch import save_file

from benchmarks.mask_tiles import KINDS, by_lists, counted, measured, of_a_block, ordered
from benchmarks.strips_product import measured as product_row


def dense(name: str, m: int, n: int) -> torch.Tensor:
    mask = torch.zeros(m, n, dtype=torch.bool)
    mask.view(-1)[MASKS[name](m, n).to_flat()] = True
    return mask


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("tile", [(16, 16), (1, 128), (128, 1), (64, 64)], ids=str)
def test_tiles_with_entries_are_counted(name: str, tile: tuple[int, int]) -> None:
    mask, (a, b) = dense(name, 130, 140), tile
    parts = [mask[i : i + a, j : j + b] for i in range(0, 130, a) for j in range(0, 140, b)]
    held = [part for part in parts if bool(part.any())]
    found = counted(mask, a, b)
    assert found["share"] == pytest.approx(sum(part.numel() for part in held) / mask.numel())
    assert found["formed"] == pytest.approx(len(held) * a * b / mask.numel())
    assert found["entries"] == pytest.approx(int(mask.sum()) / max(1, len(held)))


def test_orders_keep_the_entries_and_sort_them() -> None:
    mask = dense("principal", 130, 140)
    for order, sides in (("none", ()), ("rows", (1,)), ("columns", (0,)), ("both", (0, 1))):
        sorted_ = ordered(mask, order)
        assert int(sorted_.sum()) == int(mask.sum())
        for side in sides:
            assert bool((sorted_.sum(side).diff() <= 0).all())
    assert torch.equal(ordered(mask, "none"), mask)


@pytest.mark.parametrize("name", ["empty", "one row", "principal", "full"])
def test_lists_form_the_rows_of_sorted_strips(name: str) -> None:
    mask = dense(name, 130, 140)
    found = by_lists(mask)
    assert found["share"] == pytest.approx(counted(ordered(mask, "columns"), 1, 128)["share"])
    assert found["formed"] >= found["share"]


def test_a_checkpoint_is_measured(tmp_path: Path) -> None:
    tensors = {f"model.layers.1.{kind}.weight": torch.randn(96, 128) for kind in KINDS}
    save_file(tensors, tmp_path / "model.safetensors")
    rows = measured(tmp_path, [1])
    assert {row["kind"] for row in rows} == set(KINDS)
    assert {row["blocks"] for row in rows} == {"1"}
    assert all(0 < row["share"] <= 1 for row in rows)
    whole = of_a_block(rows)
    assert len(whole) * len(KINDS) == len(rows)


def test_ways_to_form_the_gradient_agree() -> None:
    row = product_row((64, 256), 0.05, 1.0, 16, torch.device("cpu"))
    assert float(row["equal"]) < 2e-2
    assert 0 < row["share"] <= 2
    assert row["ratio"] > 0
