"""A dozen families that differ in kind, from attach to a merge in stock transformers.

The sweep over all of them is `benchmarks/families.py`, whose walk this is.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
from sweeps import swept
from transformers import CONFIG_MAPPING

from benchmarks.families import BOUNDS, one

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
@pytest.mark.parametrize("family", ["qwen3_vl_moe", "gemma3"])
def test_a_family_that_sees_is_trained_saved_and_merged_whole(family: str) -> None:
    """The first of them stores its experts transposed."""
    found = one(family, whole=True)
    assert found["found"] in ("ok", "note"), found
