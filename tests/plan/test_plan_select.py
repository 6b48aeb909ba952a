"""What attaching takes beside a loaded base: never more than was planned, and little less."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from families import config_of
from sweeps import swept
from transformers import AutoModelForCausalLM

from leanlift import LiftConfig, PlanSettings, get_lift_model, plan_memory
from leanlift.measure import LiveBytes
from leanlift.plan import Batch

CASES: dict[str, tuple[dict[str, Any], float]] = {
    "a selection": ({"approx_rank": 8}, 0.6),
    "values": ({"density": 0.95, "selector": "random"}, 0.9),
    "INT8 ends": ({"quantize_embeddings": True, "selector": "magnitude"}, 0.995),
    "INT8 ends and values": (
        {"quantize_embeddings": True, "density": 0.5, "selector": "magnitude"}, 0.995),
}  # fmt: skip
"""What is trained, and at least how much of what was planned is there beside the base."""


@pytest.mark.parametrize("name", swept(CASES, "INT8 ends and values"))
@pytest.mark.parametrize("family", swept(["llama", "qwen2, tied"], "llama"))
def test_attaching_needs_no_more_than_was_planned(family: str, name: str, tmp_path: Path) -> None:
    options, share = CASES[name]
    blocks = {"num_hidden_layers": 16} if name == "values" else {}
    shape = config_of(family, vocab_size=131072, hidden_size=64, intermediate_size=64, **blocks)
    shape.save_pretrained(tmp_path)
    config = LiftConfig(**options)
    settings = PlanSettings(cuda=False, dtype="float32", load_in_4bit=False, largest=Batch(1, 8))
    planned = plan_memory(tmp_path, config, settings).phases["select"]
    with LiveBytes() as live:
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
        gc.collect()
        live.peak = base = live.current
        get_lift_model(model, config, progress=False)
    assert live.peak <= planned + 256  # buffers that are no numbers of the model
    assert live.peak - base >= share * (planned - base), (live.peak - base) / (planned - base)
