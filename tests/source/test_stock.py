"""What loading by stock transformers takes, beside what it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import config_of
from tiny import load
from transformers import AutoModelForCausalLM, core_model_loading

from leanlift.measure import LiveBytes
from leanlift.source import loading_nbytes
from leanlift.source.stock import LOADED_AT_ONCE


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few tensors, each of them large."""
    place = tmp_path_factory.mktemp("wide")
    sizes = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 1024}
    config = config_of("llama", **sizes, num_hidden_layers=3, num_key_value_heads=4)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(place)
    return place


@pytest.mark.parametrize("kind", ["nf4+double", "int8"])
def test_the_peak_of_loading_is_within_the_rule(wide: Path, kind: str) -> None:
    load(wide, kind)  # what is made once
    with LiveBytes() as live:
        model = load(wide, kind)
    assert model.get_input_embeddings() is not None
    assert live.peak <= loading_nbytes(live.current, 4 * 256 * 1024)


def test_no_more_matrices_are_read_at_once_than_the_rule_says() -> None:
    """The threads that read are not followed by `LiveBytes`; how many there are is said."""
    assert 0 < core_model_loading.GLOBAL_WORKERS <= LOADED_AT_ONCE
    assert loading_nbytes(100, 10) == 100 + 10 * LOADED_AT_ONCE
