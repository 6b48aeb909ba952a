"""Experts in few bits: trained, merged, and computed with where they are not trained."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import (
    CONFIG,
    MIXTURES,
    batch,
    dense_twin,
    experts_of,
    logits,
    move,
)
from sweeps import swept
from tiny import load

from leanlift import (
    LiftConfig,
    UserError,
    get_lift_model,
    load_adapter,
    merge_adapter,
    quantize_experts,
    refresh_mask,
    save_adapter,
)
from leanlift.adapters import Adapter
from leanlift.layers import FrozenLinear
from leanlift.model import freeze_quantized, lift_layers
from leanlift.model.stacks import named_parts
from leanlift.weights.quantized import requantize

FEW_BITS = swept(
    product(["nf4", "nf4+double", "fp4", "int8"], ["qwen3_moe", "gpt_oss"]),
    ("nf4", "qwen3_moe"),
    ("int8", "gpt_oss"),
)

each_family = pytest.mark.parametrize("family", MIXTURES)


@pytest.mark.parametrize(("kind", "family"), FEW_BITS)
def test_experts_in_few_bits_are_trained_saved_and_merged(
    bases: dict[str, Path], tmp_path: Path, family: str, kind: str
) -> None:
    model = get_lift_model(quantize_experts(load(bases[family], kind)), CONFIG, progress=False)
    experts = experts_of(model)
    formats = {layer.weight_tiles.format for layer in lift_layers(model).values()}  # type: ignore[attr-defined]
    assert len(formats) == 1
    assert str(formats.pop()).startswith(kind)
    for name, layer in experts.items():  # blocks and scales go over expert borders, or by rows
        stack = named_parts(load(bases[family], "dense"))[name].weight.detach().flatten(0, 1)  # type: ignore[union-attr,operator]
        wanted = requantize(stack, layer.weight_tiles.format, stack.device)  # type: ignore[attr-defined]
        rows = layer.weight_tiles.rows(0, len(stack))
        assert torch.equal(rows, wanted.rows(0, len(stack)))
    move(model)
    stock = load(bases[family], "dense")
    parts = dense_twin(model, stock)
    wanted_loss = stock.eval()(**batch()).loss
    wanted_loss.backward()
    loss = model.eval()(**batch()).loss
    loss.backward()
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=1e-5)
    for name, layer in experts.items():
        dense = parts[name].weight.grad
        found = layer.values.grad - dense.reshape(-1)[layer.index.to_flat()]
        assert float(found.abs().max()) <= 1e-3 * float(dense.abs().max()), name
    refresh_mask(model)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(quantize_experts(load(bases[family], kind)), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(UserError, match="the loaded model has it in float32"):
        load_adapter(load(bases[family], kind), tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype="float32", onto="quantized",
                  progress=False)  # fmt: skip
    torch.testing.assert_close(logits(load(tmp_path / "merged", "dense")), logits(model))


def test_a_stack_is_read_and_quantized_once_in_a_merge(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import leanlift.export.shared as room

    model = quantize_experts(load(bases["qwen3_moe"], "nf4"))
    save_adapter(get_lift_model(model, CONFIG, progress=False), tmp_path / "adapter")
    shapes, original = [], room.requantize

    def counted(weight: Any, *rest: Any) -> Any:
        shapes.append(weight.shape)
        return original(weight, *rest)

    read, layer = [], Adapter.layer

    def noted(self: Adapter, name: str) -> Any:
        read.append(name)
        return layer(self, name)

    monkeypatch.setattr(room, "requantize", counted)
    monkeypatch.setattr(Adapter, "layer", noted)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", onto="quantized", progress=False)
    assert len(shapes) == len(lift_layers(model))
    assert sorted(read) == sorted(lift_layers(model))


def test_experts_stay_where_nothing_is_quantized_and_where_there_are_none(
    bases: dict[str, Path],
) -> None:
    model = load(bases["mixtral"], "dense")
    before = {name: id(p) for name, p in model.named_parameters()}
    assert quantize_experts(model) is model
    assert {name: id(p) for name, p in model.named_parameters()} == before


def test_quantized_experts_that_are_not_trained_are_computed_with(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    stock = quantize_experts(load(bases["mixtral"], "nf4"))
    freeze_quantized(stock)
    before, model = logits(stock), quantize_experts(load(bases["mixtral"], "nf4"))
    attention = LiftConfig(density=0.1, approx_rank=8, target_modules="attention")
    model = get_lift_model(model, attention, progress=False)
    assert not experts_of(model)
    torch.testing.assert_close(logits(model), before)
    assert len({id(m.workspace) for m in model.modules() if isinstance(m, FrozenLinear)}) == 1
    move(model)
    save_adapter(model, tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype="float32", onto="quantized",
                  progress=False)  # fmt: skip
    torch.testing.assert_close(logits(load(tmp_path / "merged", "dense")), logits(model))
