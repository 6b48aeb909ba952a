"""The step of a plan has the peak of a real one where long rows go in pieces and inputs wait on the
host, and few of its blocks say what all of them take."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from families import config_of
from sweeps import swept
from transformers import AutoModelForCausalLM

from leanlift import LiftConfig, get_lift_model
from leanlift.layers import LiftLinear
from leanlift.measure import LiveBytes
from leanlift.model import lifted, tiled_mlp
from leanlift.plan.base import without_packing_search
from leanlift.plan.fake import StepBytes, attach_fake, fake_tensors, step_peak
from leanlift.plan.loss import loss_of_all_tokens
from leanlift.plan.pieces import first_pieces
from leanlift.streaming.offload import Host, Offload
from leanlift.weights.quantized import WeightFormat

TOKENS, BLOCKS = 600, 8
FAMILIES = ("llama", "phi3, fused", "gemma2", "qwen3")
WAYS = {"plain": (False, False), "tiled": (True, False), "offloaded": (False, True),
        "tiled, offloaded": (True, True), "larger pieces": (256, False)}  # fmt: skip
"""Whether MLPs go in pieces (True), or of how many tokens; whether activations wait elsewhere."""
CONFIG = LiftConfig(selector="magnitude", density=0.05)

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable. is deprecated")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanlift.layers.tiled_mlp.LEAST", 64)
    monkeypatch.setattr("leanlift.layers.tiled_mlp.MOST", 128)
    monkeypatch.setattr("leanlift.layers.tiled_norms.PIECE_BYTES", 64 * 64 * 4)


def config(family: str) -> Any:
    wide = {"intermediate_size": 512, "max_position_embeddings": 1024}
    return config_of(family, num_hidden_layers=BLOCKS, **wide)


def planned(family: str, tiled: int, offload: bool, whole: bool = False) -> StepBytes:
    with without_packing_search(), fake_tensors():
        model = AutoModelForCausalLM.from_config(config(family), dtype=torch.float32)
        attach_fake(model, CONFIG, WeightFormat("dense", "float32"), False, first_pieces("cpu"))
        if tiled:
            tiled_mlp(model, None if tiled is True else tiled)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return step_peak(
            model.train(), loss_of_all_tokens, 1, TOKENS, True, False, offload, whole=whole
        )


def measured(family: str, tiled: int, offload: bool) -> int:
    """The second step's: scratch and buffers are there from the first."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(family), dtype=torch.float32)
    model = lifted(get_lift_model(model, CONFIG, progress=False)).train()
    if tiled:
        tiled_mlp(model, None if tiled is True else tiled)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.modules():
        if isinstance(layer, LiftLinear):
            layer.values.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    context = Offload(model, Host(torch.device("cpu"))) if offload else nullcontext()
    ids = torch.randint(3, 60, (1, TOKENS))
    for _ in range(2):
        with context, LiveBytes() as live:
            loss_of_all_tokens(model, ids, ids.clone()).backward()
    return live.peak


@pytest.mark.parametrize("way", swept(WAYS, "tiled, offloaded"))
@pytest.mark.parametrize("family", swept(FAMILIES, "llama"))
def test_the_peak_is_that_of_a_real_step(family: str, way: str) -> None:
    assert planned(family, *WAYS[way]).peak == pytest.approx(measured(family, *WAYS[way]), rel=0.05)


@pytest.mark.parametrize("way", swept(WAYS, "tiled, offloaded"))
@pytest.mark.parametrize("family", swept(FAMILIES, "llama"))
def test_few_blocks_say_what_all_take(family: str, way: str) -> None:
    assert planned(family, *WAYS[way]) == planned(family, *WAYS[way], whole=True)


def test_each_way_needs_less() -> None:
    peaks = {way: planned("llama", *how).peak for way, how in WAYS.items()}
    assert peaks["tiled, offloaded"] < 0.6 * peaks["plain"]
    assert peaks["tiled, offloaded"] < min(peaks["tiled"], peaks["offloaded"])
    assert peaks["tiled"] < peaks["larger pieces"] < peaks["plain"]
