"""Experts in MXFP4: what is read of them, by rows and by entries, is what transformers decodes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from leanlift import UserError
from leanlift.fingerprint import sampled_rows
from leanlift.source import by_rows, open_checkpoint, plain_view
from leanlift.source.mxfp4 import Mxfp4Stack

E, M, N = 5, 96, 7
NAME = "layers.0.experts.down_proj"


def codes(seed: int = 0) -> dict[str, torch.Tensor]:
    """Every byte of codes, and scales over the whole range in which bfloat16 has the numbers."""
    generator = torch.Generator().manual_seed(seed)

    def some(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)

    return {
        f"{NAME}_blocks": some(0, 256, E, N, M // 32, 16),
        f"{NAME}_scales": some(2, 251, E, N, M // 32),
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mxfp4")
    save_file({**codes(), "other": torch.ones(3)}, path / "model.safetensors")
    return path


@pytest.fixture(scope="module")
def oracle() -> torch.Tensor:
    return convert_moe_packed_tensors(*codes().values())


def test_a_stack_is_one_tensor_of_the_checkpoint(place: Path, oracle: torch.Tensor) -> None:
    with open_checkpoint(place) as files:
        tensors = plain_view(files)
        assert list(tensors) == [NAME, "other"]
        stack = tensors[NAME]
        assert isinstance(stack, Mxfp4Stack)
        assert (stack.shape, stack.dtype) == (tuple(oracle.shape), torch.bfloat16)
        assert stack.stored_names == tuple(codes())
        assert torch.equal(stack.whole(), oracle)
        assert torch.equal(stack.rows(1, 4), oracle[1:4])
        assert torch.equal(stack.sample(2), oracle[sampled_rows(E, 2)])


@examples(60)
@given(data=st.data())
def test_any_rows_and_entries(place: Path, oracle: torch.Tensor, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, E * M - 1))
    stop = data.draw(st.integers(start + 1, E * M))
    flat = torch.tensor(sorted(data.draw(st.sets(st.integers(0, E * M * N - 1), max_size=9))))
    with open_checkpoint(place) as files:
        rows = by_rows(plain_view(files)[NAME])  # type: ignore[arg-type]
        assert torch.equal(rows.rows(start, stop), oracle.flatten(0, 1)[start:stop])
        assert torch.equal(rows.entries(flat.long()), oracle.flatten()[flat.long()])


def test_tensors_of_such_names_that_hold_numbers_are_what_they_are(tmp_path: Path) -> None:
    save_file({f"{NAME}_blocks": torch.ones(3), f"{NAME}_scales": torch.ones(2)},
              tmp_path / "model.safetensors")  # fmt: skip
    with open_checkpoint(tmp_path) as files:
        assert set(plain_view(files)) == set(files)


DAMAGES = {
    "other scales": {f"{NAME}_scales": torch.zeros(E, N, M // 32 + 1, dtype=torch.uint8)},
    "no groups of 32": {f"{NAME}_blocks": torch.zeros(E, N, M // 32, 15, dtype=torch.uint8)},
    "a matrix": {f"{NAME}_blocks": torch.zeros(N, M // 2, dtype=torch.uint8)},
    "numbers": {f"{NAME}_scales": torch.zeros(E, N, M // 32)},
}


@pytest.mark.parametrize("what", DAMAGES)
def test_parts_that_do_not_fit_are_refused(tmp_path: Path, what: str) -> None:
    save_file({**codes(), **DAMAGES[what]}, tmp_path / "model.safetensors")
    with (
        open_checkpoint(tmp_path) as files,
        pytest.raises(UserError, match=f"{NAME} of the base is in MXFP4, but not whole"),
    ):
        plain_view(files)
