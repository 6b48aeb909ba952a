"""Mixtures of experts from the command line's side: loaded in few bits, looked at, verified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import MIXTURES, logits, make_mixture, move
from sweeps import swept
from tiny import load

from leanlift import (
    LiftConfig,
    get_lift_model,
    load_adapter,
    merge_adapter,
    quantize_experts,
    save_adapter,
)
from leanlift.adapters import open_adapter
from leanlift.evaluation.verify import verify_merged
from leanlift.layers import FrozenExperts
from leanlift.source import check_matrix_homes
from leanlift.training import LiftSFTConfig, RunArguments
from leanlift.training.base import load_model
from leanlift.training.load import load_as_trained
from leanlift.training.plan import layout_of_base, targets_of

CPU = torch.device("cpu")
CONFIG = LiftConfig(density=0.1, approx_rank=8)
EITHER = pytest.mark.parametrize("few_bits", [True, False], ids=["nf4", "16 bits"])


@pytest.fixture(
    scope="module", params=swept(["qwen3_moe", "gpt_oss", "granitemoe"], "qwen3_moe", "gpt_oss")
)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mixture(MIXTURES[request.param], tmp_path_factory.mktemp("base") / "base")


def experts(model: Any) -> list[FrozenExperts]:
    return [module for module in model.modules() if isinstance(module, FrozenExperts)]


def test_a_base_in_few_bits_has_its_experts_in_few_bits(base: Path) -> None:
    args = RunArguments(model_name_or_path=str(base), dataset_name="", dtype="float32")
    found = experts(load_model(args, CPU))
    assert len(found) == 4
    assert {layer.weight_tiles.format.kind for layer in found} == {"nf4"}  # type: ignore[attr-defined]
    args = RunArguments(
        model_name_or_path=str(base), dataset_name="", dtype="float32", load_in_4bit=False
    )
    assert not experts(load_model(args, CPU))


@EITHER
def test_a_base_is_loaded_as_an_adapter_was_trained(
    base: Path, tmp_path: Path, few_bits: bool
) -> None:
    stock = load(base, "nf4+double")
    model = get_lift_model(quantize_experts(stock) if few_bits else stock, CONFIG, progress=False)
    move(model)
    save_adapter(model, tmp_path / "adapter")
    with open_adapter(tmp_path / "adapter") as adapter:
        again = load_as_trained(adapter, None, CPU)
    assert bool(experts(again)) == few_bits
    assert torch.equal(logits(load_adapter(again, tmp_path / "adapter")), logits(model))


def test_a_model_without_contents_knows_where_its_experts_are_stored(base: Path) -> None:
    args = RunArguments(model_name_or_path=str(base), dataset_name="")
    sft = LiftSFTConfig("unused", use_cpu=True, bf16=False)
    targets = targets_of(args, sft)
    assert sum(name.endswith(("gate_up_proj", "down_proj")) for name in targets) == 4
    check_matrix_homes(targets, base, layout_of_base(args, sft, base))


@EITHER
@pytest.mark.parametrize("onto", swept(["original", "quantized"], "quantized"))
def test_a_merge_is_verified(base: Path, tmp_path: Path, few_bits: bool, onto: str) -> None:
    stock = load(base, "nf4+double")
    model = get_lift_model(quantize_experts(stock) if few_bits else stock, CONFIG, progress=False)
    move(model)
    save_adapter(model, tmp_path / "adapter")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "one and one is", "completion": "two"}\n')
    report = merge_adapter(
        tmp_path / "adapter", tmp_path / "merged", dtype="float32", onto=onto, progress=False
    )
    found = verify_merged(tmp_path / "adapter", report, str(rows))
    assert 0 <= found.difference <= found.bound < found.effect
