"""A dozen families that differ in kind, from attach to a merge in stock transformers.

The sweep over all of them is `benchmarks/families.py`, whose walk this is.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sweeps import swept
from tiny import quantization
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from benchmarks.families import BOUNDS, load, logits, make, one
from leanlift import LiftConfig, get_lift_model, merge_adapter, quantize_experts, save_adapter
from leanlift.layers import FrozenExperts
from leanlift.model import lift_layers
from leanlift.training import load_in_few_bits

FAMILIES: dict[str, str] = {
    "llama": "ok",
    "falcon": "ok",  # a class of Linears of its own
    "camembert": "note",  # a head that is tied, and stands before the embedding
    "bert": "note",  # a transform before the head
    "bart": "note",  # a loss that does not shift its labels
    "cohere2": "ok",  # scaled logits
    "deepseek_v3": "",  # latent attention, experts
    "gemma2": "ok",  # capped logits
    "gemma3n_text": "note",  # weights that parents clamp
    "lfm2": "note",  # convolutions
    "mamba": "note",  # weights that parents read
    "opt": "ok",  # blocks without named parts
    "phi": "ok",  # a bias of the head
    "qwen3_5_text": "note",  # linear attention
    "reformer": "refused",  # one operation of autograd
    "zamba": "note",  # blocks that are gone through several times
}
"""What is found, by family; nothing where it depends on how experts are held."""
CHEAP = ("camembert",)


@pytest.mark.filterwarnings("ignore")  # of the families' own code
@pytest.mark.parametrize("family", swept(FAMILIES, *CHEAP))
def test_a_family_is_trained_saved_and_merged_or_refused(family: str) -> None:
    if family not in CONFIG_MAPPING:
        pytest.skip("this transformers has no such family")
    found: dict[str, Any] = one(family)
    assert found["found"] == FAMILIES[family] or not FAMILIES[family], found
    assert found["found"] != "FAILED", found
    if found["found"] == "refused":
        assert found["said"].endswith(".")
        return
    for key, most in BOUNDS.items():
        assert math.isfinite(found[key])
        assert found[key] <= most


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
def test_a_family_that_sees_is_trained_saved_and_merged_whole() -> None:
    found = one("gemma3", whole=True)
    assert found["found"] in ("ok", "note"), found


def experts_of(model: Any) -> list[FrozenExperts]:
    return [module for module in model.modules() if isinstance(module, FrozenExperts)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("few_bits", swept([True, False], True), ids=["nf4", "16 bits"])
def test_stacks_that_are_stored_transposed(tmp_path: Path, few_bits: bool) -> None:
    """As Qwen3-VL's mixtures are published; stock transformers saves them as they live."""
    make("qwen3_vl_moe", tmp_path / "saved", True)
    base = Path(shutil.copytree(tmp_path / "saved", tmp_path / "base"))
    stored = load_file(base / "model.safetensors")
    turned = [name for name in stored if name.endswith("experts.gate_up_proj")]
    for name in turned:
        stored[name] = stored[name].transpose(1, 2).contiguous()
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits(load(base, False)), logits(load(tmp_path / "saved", False)))

    model = load(base)
    if few_bits:
        model = quantize_experts(model)
        read = load_in_few_bits(
            AutoModelForImageTextToText, base, quantization_config=quantization("nf4"),
            dtype=torch.float32,
        )  # fmt: skip
        for one, other in zip(experts_of(model), experts_of(read), strict=True):
            m = one.weight_tiles.shape[0]
            assert torch.equal(one.weight_tiles.rows(0, m), other.weight_tiles.rows(0, m))
    model = get_lift_model(model, LiftConfig(density=0.1, approx_rank=8), progress=False)
    for layer in lift_layers(model).values():
        layer.values.data.normal_(0, 0.02)
    save_adapter(model, tmp_path / "adapter")
    for onto in "quantized", "original":
        place = tmp_path / onto
        merge_adapter(tmp_path / "adapter", place, dtype="float32", onto=onto, progress=False)
        merged = load_file(place / "model.safetensors")
        assert {n: t.shape for n, t in merged.items()} == {n: t.shape for n, t in stored.items()}
    off = (logits(load(tmp_path / "quantized", False)) - logits(model)).abs()
    assert float(off.max()) < 1e-4
    for name in turned:
        layer = lift_layers(model)[name]
        moved = (merged[name] - stored[name]).transpose(1, 2).reshape(-1)
        wanted = torch.zeros_like(moved)
        wanted[layer.index.to_flat()] = layer.values.detach()
        torch.testing.assert_close(moved, wanted, atol=1e-6, rtol=0)
