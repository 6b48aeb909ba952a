"""What the layers of a model share, and the offsets that a layer takes over."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import make_base, make_block, make_lift, make_linear4bit

from leanlift.layers import Workspace, cpu_product, scratch_nbytes
from leanlift.ops import tile_ops
from leanlift.ops.reference import TorchOps
from leanlift.sparse import LayerOffsets, Offsets


def test_operations_are_chosen_once_for_all_layers_and_again_after_a_move(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def counted(name: str, device: torch.device) -> Any:
        asked.append(name)
        return tile_ops(name, device)

    monkeypatch.setattr("leanlift.layers.workspace.tile_ops", counted)
    block, x = make_block(Workspace()), torch.randn(3, 48, requires_grad=True)
    for _ in range(3):
        block(x).sum().backward()
    assert asked == ["auto"]
    block.to("cpu")
    block(x)
    block[0].workspace.use("torch")
    block(x)
    assert asked == ["auto", "auto", "torch"]
    twin = copy.deepcopy(block)
    twin(x)
    assert asked[3:] == ["torch"]
    assert pickle.loads(pickle.dumps(block[0].workspace)).ops is None


def test_operations_that_are_given_stay() -> None:
    class Mine(TorchOps):
        name = "mine"

    block, x = make_block(Workspace(Mine())), torch.randn(3, 48)
    block.to("cpu")
    block(x)
    assert type(block[0].workspace.ops) is Mine
    assert type(copy.deepcopy(block)[0].workspace.ops) is Mine


def test_offsets_of_another_count_or_in_two_stores_are_not_taken() -> None:
    lift = make_lift(make_linear4bit(65, 48))
    before, active = lift.learned, lift.learned.active
    other = Offsets.from_flat(torch.arange(3), torch.ones(3), (65, 48))
    with pytest.raises(ValueError, match="entries, got 3"):
        lift.put(LayerOffsets(other))
    twice = Offsets.from_flat(active.index.to_flat()[:1], torch.ones(1), (65, 48))
    with pytest.raises(ValueError, match="outside the mask"):
        lift.put(LayerOffsets(active, twice))
    assert lift.learned.active.index is before.active.index
    assert torch.equal(lift.values, before.active.values)


@pytest.mark.parametrize("stands_for", [None, "cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "int8", "dense"])
def test_the_scratch_is_as_large_as_is_said_before(
    kind: str, dtype: torch.dtype, stands_for: str | None
) -> None:
    """Rows of NF4 alone are new, here in fp32."""
    workspace = Workspace(stands_for=stands_for)
    layers = [make_lift(make_base(kind, m, 64), workspace=workspace) for m in (64, 192, 128)]
    said = scratch_nbytes(layers, dtype)
    for layer in layers:
        assert layer.effective_weight(dtype).dtype == dtype
    assert workspace.scratch.nbytes == said
    made_in_place = kind == "nf4" and dtype == torch.float32 and stands_for != "cuda"
    assert said == (0 if made_in_place else dtype.itemsize * 192 * 64)
    assert scratch_nbytes([], dtype) == 0


def test_a_cpu_s_scratch_has_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as its products make at once."""
    monkeypatch.setattr(cpu_product, "tile_rows", lambda *_: 64)
    workspace = Workspace()
    layers = [make_lift(make_base("dense", m, 96), workspace=workspace) for m in (64, 192, 128)]
    said = scratch_nbytes(layers, torch.bfloat16)
    for layer in layers:
        layer.product_back(layer.product(torch.randn(9, 96).bfloat16()))
    assert workspace.scratch.nbytes == said == 2 * 64 * 96
