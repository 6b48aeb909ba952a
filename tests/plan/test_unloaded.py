"""What a plan takes for quantized is what transformers quantizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import SIZES, config_of
from planned import arguments
from tiny import make_checkpoint_of, quantization
from transformers import AutoModelForCausalLM, Zamba2Config

from leanlift import get_lift_model
from leanlift.measure import static_categories
from leanlift.training import plan_of

pytestmark = pytest.mark.filterwarnings("ignore:.*already quantized.*")


def shared_blocks(place: Path) -> Path:
    """A model that goes through one block twice, whose weights are those of two Linears each."""
    config = Zamba2Config(
        **{**SIZES, "num_hidden_layers": 4, "num_key_value_heads": 4}, attention_head_dim=32,
        attention_hidden_size=128, mamba_d_state=8, mamba_headdim=32, n_mamba_heads=4, chunk_size=8,
        layers_block_type=["mamba", "hybrid"] * 2, num_mem_blocks=1, use_mem_eff_path=False,
    )  # fmt: skip
    return make_checkpoint_of(config, place)


def with_dense_parts(place: Path) -> Path:
    """A checkpoint in NF4 that keeps some matrices in 16 bits, as it says itself."""
    how: Any = quantization("nf4")
    how.llm_int8_skip_modules = ["lm_head", "model.layers.0.self_attn", "down_proj"]
    stored = make_checkpoint_of(config_of("llama"), place / "dense")
    model = AutoModelForCausalLM.from_pretrained(
        stored, dtype=torch.float32, quantization_config=how
    )
    model.save_pretrained(place)
    return place


@pytest.mark.parametrize("made", [shared_blocks, with_dense_parts])
def test_what_is_held_is_planned_to_the_byte(made: Any, tmp_path: Path) -> None:
    place = made(tmp_path / "base")
    given = arguments(place, approx_rank=8, max_length=16, bnb_4bit_use_double_quant=False)
    planned = plan_of(*given, cuda=False).categories
    how = {"quantization_config": quantization("nf4")} if made is shared_blocks else {}
    real = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **how)
    held = static_categories(get_lift_model(real, given[0].lift_config(), progress=False))
    for category in ("base weights", "norms and other", "index", "values"):
        assert planned[category] == held[category], category
