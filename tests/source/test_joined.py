"""Tensors of a checkpoint that hold matrices of the model in another shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from leanlift.fingerprint import Segment
from leanlift.source import find, open_checkpoint, plain_view, turned_rows
from leanlift.source.joined import JoinedRows


@pytest.mark.parametrize("shape", [(7, 5), (3, 7, 5)], ids=["a matrix", "a stack"])
def test_rows_of_transposes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    stored = torch.randn(*shape)
    save_file({"w": stored}, tmp_path / "model.safetensors")
    wanted = stored.transpose(-1, -2).reshape(-1, 7)
    with open_checkpoint(tmp_path) as tensors:
        rows = turned_rows(tensors["w"])
        assert rows.shape == wanted.shape
        for start in range(len(wanted)):
            for stop in range(start + 1, len(wanted) + 1):
                assert torch.equal(rows.rows(start, stop), wanted[start:stop])
        flat = torch.randperm(wanted.numel())
        assert torch.equal(rows.entries(flat), wanted.flatten()[flat])
        home = (Segment("w", 0, len(wanted), turned=True),)
        joined = JoinedRows.of("model.w", home, plain_view(tensors))
        assert joined is not None
        assert torch.equal(joined.rows(0, len(wanted)), wanted)
        assert find("model.w", plain_view(tensors)) is not None
