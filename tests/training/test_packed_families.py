"""Packed rows of a model that cannot keep them apart: refused before training, not in its first
step."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_tokenizer
from transformers import AutoModelForCausalLM, GraniteMoeHybridConfig

from leanlift import LiftConfig, LiftTrainer, UserError, get_lift_model
from leanlift.training import LiftSFTConfig

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "shared_intermediate_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 0,
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16,
}  # fmt: skip


def trainer_of(kinds: list[str], out: Path, **more: Any) -> LiftTrainer:
    config = GraniteMoeHybridConfig(**SIZES, layer_types=kinds, num_hidden_layers=len(kinds))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    args = LiftSFTConfig(
        output_dir=str(out), use_cpu=True, bf16=False, max_steps=1, save_strategy="no",
        disable_tqdm=True, gradient_checkpointing=False, max_length=64, **more,
    )  # fmt: skip
    return LiftTrainer(
        model=get_lift_model(model, LiftConfig(approx_rank=2), progress=False),
        args=args,
        train_dataset=[{"text": f"{n} is {n}"} for n in range(8)],
        processing_class=make_tokenizer(),
    )


@pytest.mark.skipif(
    importlib.util.find_spec("mamba_ssm") is not None, reason="with it, packed rows are kept apart"
)
def test_scans_without_their_kernel_are_refused(tmp_path: Path) -> None:
    kinds = ["mamba", "attention"]
    with pytest.raises(UserError, match=r"cannot be trained on packed rows.*mamba_ssm"):
        trainer_of(kinds, tmp_path, packing=True)
    assert trainer_of(kinds, tmp_path).train().training_loss > 0


def test_attention_alone_keeps_them_apart(tmp_path: Path) -> None:
    assert trainer_of(["attention"] * 2, tmp_path, packing=True).train().training_loss > 0
