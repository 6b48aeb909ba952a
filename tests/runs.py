"""Short runs of LiftTrainer on a tiny base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tiny import load, make_tokenizer
from transformers import TrainerCallback

from leanlift import LiftConfig, LiftTrainer, get_lift_model
from leanlift.model import lift_layers, lifted
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


LIFT = LiftConfig(density=0.1, approx_rank=8, refresh_interval=4)


def sparse_trainer(
    base: Path, output: Path, lift: LiftConfig = LIFT, kind: Any = LiftTrainer, **changes: Any
) -> Any:
    """Ten unclipped steps of SparseAdamW, where `changes` says nothing else."""
    options = {"optim": "sparse_adamw", "max_grad_norm": 0.0, "max_steps": 10, **changes}
    return kind(
        model=get_lift_model(load(base), lift, progress=False),
        args=settings(output, **options),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=make_tokenizer(),
    )


def learned(trainer: LiftTrainer) -> torch.Tensor:
    return torch.cat([layer.values for layer in lift_layers(trainer.model).values()]).detach()


class Broken(LiftTrainer):
    """The loss of chosen steps (counted from 1) is NaN."""

    bad_steps: tuple[int, ...] = ()

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step + 1 in self.bad_steps:
            inner, nan = lifted(model), float("nan")
            hook = inner.lm_head.register_forward_hook(lambda m, i, out: out * nan)
            norm = inner.model.norm.register_forward_hook(lambda m, i, out: out * nan)
            try:
                return super().compute_loss(model, inputs, *args, **kwargs)
            finally:
                hook.remove()
                norm.remove()
        return super().compute_loss(model, inputs, *args, **kwargs)


class At(TrainerCallback):
    """Calls a function at the end of one step."""

    def __init__(self, step: int, function: Any) -> None:
        self.step, self.function = step, function

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.function()
