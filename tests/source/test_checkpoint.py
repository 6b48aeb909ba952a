"""Entries of a matrix in a checkpoint: those of its rows, and no more of the file than that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import random_weight
from safetensors.torch import save_file

from leanlift.fingerprint import Segment, sampled_rows
from leanlift.fingerprint.cells import entries_of
from leanlift.measure import LiveBytes
from leanlift.source.checkpoint import open_checkpoint
from leanlift.source.joined import JoinedRows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 96), (37, 5), (1, 1)], ids=str)
def test_entries_are_those_of_the_rows(
    tmp_path: Path, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = random_weight(*shape).to(dtype)
    save_file({"before": torch.ones(3), "weight": weight}, tmp_path / "model.safetensors")
    flat = torch.randint(weight.numel(), (20,))  # in no order, some of them twice
    with open_checkpoint(tmp_path) as tensors:
        stored = tensors["weight"]
        assert torch.equal(entries_of(stored, flat), weight.flatten()[flat])
        by_rows = [stored.rows(int(i) // shape[1], int(i) // shape[1] + 1) for i in flat]
        assert torch.equal(
            stored.entries(flat),
            torch.stack([row[0, int(i) % shape[1]] for row, i in zip(by_rows, flat, strict=True)]),
        )


def test_entries_take_no_memory_for_the_matrix(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(512, 512)}, tmp_path / "model.safetensors")
    flat = torch.arange(10) * 1000
    with open_checkpoint(tmp_path) as tensors, LiveBytes() as live:
        entries_of(tensors["weight"], flat)
    assert 0 < live.peak < 1000


def test_a_tensor_in_parts_is_sampled_as_the_whole_would_be(tmp_path: Path) -> None:
    whole = random_weight(37, 6)
    save_file({"head": whole[:5], "tail": whole[5:]}, tmp_path / "model.safetensors")
    home = (Segment("head", 0, 5), Segment("tail", 0, 32))
    with open_checkpoint(tmp_path) as tensors:
        joined = JoinedRows.of("whole", home, tensors)
        assert joined is not None
        for rows in (1, 4, 37, 100):
            assert torch.equal(joined.sample(rows), whole[sampled_rows(37, rows)])
