"""A GPT-OSS as it is published: loaded in few bits or in 16, trained, merged, verified, planned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mixtures import CONFIG, logits, make_mxfp4, move
from safetensors.torch import load_file, save_file
from sweeps import swept
from tiny import FORMATS, load
from transformers import AutoModelForCausalLM, Mxfp4Config

from leanlift import UserError, get_lift_model, load_adapter, merge_adapter, save_adapter
from leanlift.adapters import open_adapter
from leanlift.evaluation.verify import verify_merged
from leanlift.layers import FrozenExperts
from leanlift.model.stacks import named_parts
from leanlift.plan import plan_memory
from leanlift.plan.base import FakeBase
from leanlift.training import RunArguments
from leanlift.training.base import load_model
from leanlift.training.load import load_as_trained
from leanlift.weights.quantized import requantize

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mxfp4(tmp_path_factory.mktemp("mxfp4") / "base")


def arguments(base: Path, kind: str) -> RunArguments:
    return RunArguments(
        model_name_or_path=str(base), dataset_name="", dtype="float32", **FORMATS[kind]
    )


@pytest.mark.parametrize("kind", swept(FORMATS, "nf4", "dense"))
def test_it_is_loaded_as_stock_transformers_decodes_it(base: Path, kind: str) -> None:
    decoded = Mxfp4Config(dequantize=True)
    stock = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=decoded, dtype=torch.float32
    )
    model = load_model(arguments(base, kind), CPU)
    if kind == "dense":
        assert torch.equal(logits(model), logits(stock))
        return
    parts = named_parts(stock)
    found = {n: m for n, m in model.named_modules() if isinstance(m, FrozenExperts)}
    assert len(found) == 2 * 2
    for name, layer in found.items():
        tiles = layer.weight_tiles
        matrix = parts[name].weight.detach().flatten(0, 1)  # type: ignore[union-attr,operator]
        wanted = requantize(matrix, tiles.format, CPU)  # type: ignore[attr-defined]
        assert torch.equal(tiles.rows(0, len(matrix)), wanted.rows(0, len(matrix)))


@pytest.mark.parametrize(
    ("kind", "onto"),
    swept(
        [(kind, onto) for kind in ("nf4", "int8", "dense") for onto in ("original", "quantized")],
        ("nf4", "original"),
    ),
)
def test_it_is_merged_onto_what_was_published(
    base: Path, tmp_path: Path, kind: str, onto: str
) -> None:
    model = get_lift_model(load_model(arguments(base, kind), CPU), CONFIG, progress=False)
    move(model)
    save_adapter(model, tmp_path / "adapter")
    with open_adapter(tmp_path / "adapter") as adapter:
        again = load_as_trained(adapter, None, CPU)
    assert torch.equal(logits(load_adapter(again, tmp_path / "adapter")), logits(model))
    report = merge_adapter(
        tmp_path / "adapter", tmp_path / "merged", dtype="float32", onto=onto, progress=False
    )
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    if onto == "quantized":
        torch.testing.assert_close(logits(load(tmp_path / "merged", "dense")), logits(model))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "one and one is", "completion": "two"}\n')
    found = verify_merged(tmp_path / "adapter", report, str(rows))
    assert 0 <= found.difference <= found.bound < found.effect


def test_it_is_planned(base: Path) -> None:
    assert FakeBase.of(base).stored is None
    assert not hasattr(FakeBase.of(base).shape, "quantization_config")
    assert plan_memory(base).holds_for["base"] == "nf4"


@pytest.mark.parametrize("part", ["blocks", "scales"])
def test_experts_without_a_part_are_refused(tmp_path: Path, part: str) -> None:
    base = make_mxfp4(tmp_path / "base", experts=2)
    tensors = load_file(base / "model.safetensors")
    del tensors[f"model.layers.1.mlp.experts.down_proj_{part}"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"was not read whole: it lacks: .*experts\.down_proj"):
        load_model(arguments(base, "nf4"), CPU)
