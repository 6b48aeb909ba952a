"""Short runs of LiftTrainer on a tiny base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tiny import load, make_tokenizer

from leanlift import LiftConfig, LiftTrainer, get_lift_model
from leanlift.model import lift_layers
from leanlift.training import LiftSFTConfig

ROWS = [{"prompt": f"{i} plus {i} is ", "completion": str(2 * i)} for i in range(48)]


def settings(output: Path, **changes: Any) -> LiftSFTConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(output),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-6,
        "warmup_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "max_length": 64,
    }
    return LiftSFTConfig(**{**defaults, **changes})


def trainer_for(base: Path, output: Path, lift: LiftConfig, **changes: Any) -> LiftTrainer:
    model = get_lift_model(load(base), lift, progress=False)
    return LiftTrainer(
        model=model,
        args=settings(output, **changes),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=make_tokenizer(),
    )


def assert_same_layers(model: Any, other: Any) -> None:
    for (name, one), two in zip(
        lift_layers(model).items(), lift_layers(other).values(), strict=True
    ):
        assert torch.equal(one.values, two.values), name
        assert torch.equal(one.index.to_flat(), two.index.to_flat()), name
        assert (one.retired_index is None) == (two.retired_index is None)
        if one.retired_index is not None and two.retired_index is not None:
            assert torch.equal(one.retired_index.to_flat(), two.retired_index.to_flat())
            assert torch.equal(one.retired_values, two.retired_values)
