"""Why a run makes its logits whole is said as it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from families import SIZES
from runs import settings
from transformers import AutoConfig, AutoModelForCausalLM

from leanlift import LiftConfig, get_lift_model
from leanlift.training.loss import WholeLoss, training_loss


@pytest.mark.parametrize(
    ("family", "tied", "what", "said"),
    [
        ("llama", False, {"modules_to_save": "lm_head"}, r"a head that is trained \(modules_to"),
        ("llama", True, {"trainable_token_indices": (5,)}, r"tied head with .* \(trainable_token"),
        ("modernbert-decoder", False, {}, "not its hidden states times"),
    ],
)
def test_why_logits_are_made_whole(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    family: str,
    tied: bool,
    what: dict[str, Any],
    said: str,
) -> None:
    config = AutoConfig.for_model(family, **{**SIZES, "tie_word_embeddings": tied})
    lift = LiftConfig(density=0.1, selector="magnitude", **what)
    model = get_lift_model(AutoModelForCausalLM.from_config(config), lift, progress=False)
    assert type(training_loss(model, settings(tmp_path), None)) is WholeLoss
    assert re.search(f"logits of this .*{said}.*: they are made whole", caplog.text)
