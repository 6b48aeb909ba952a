"""A loop that is written out, with an accelerator: the same offsets as a trainer's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from runs import assert_same_layers
from tiny import load
from transformers import Trainer, TrainingArguments

from leanlift import (
    LiftCallback,
    LiftConfig,
    SparseAdamW,
    Steps,
    UserError,
    get_lift_model,
    load_adapter,
)
from leanlift.model import lift_layers, lift_state

IDS = torch.randint(3, 90, (24, 12), generator=torch.Generator().manual_seed(0))
CONFIG = LiftConfig(approx_rank=8, refresh_interval=2)


def attached(base: Path) -> Any:
    return get_lift_model(load(base), CONFIG, progress=False).train()


def train(model: Any, steps: int, done: int = 0, state: Any = None, bad: int = -1) -> Any:
    """Two rows in a batch, two batches in a step, in their order."""
    GradientState._reset_state()  # it is one for a process, and other tests have trainers in it
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
    )
    if state is not None:
        optimizer.load_state_dict(state)
    model, optimizer = accelerator.prepare(model, optimizer)
    counted = Steps(model, optimizer, done)
    for number in range(2 * done, 2 * steps):
        ids = IDS[2 * number : 2 * number + 2]
        with accelerator.accumulate(model):
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss * float("nan") if number == bad else loss)
            if accelerator.sync_gradients:
                counted.before()
            optimizer.step()
            optimizer.zero_grad()
            if accelerator.sync_gradients:
                counted.after()
    counted.close()
    return counted


@pytest.mark.thorough
def test_it_trains_as_a_trainer_does(base: Path, tmp_path: Path) -> None:
    model = attached(base)
    counted = train(model, 5)
    assert counted.done == 5
    assert len(counted.refreshes) == 2
    other = attached(base)

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    InOrder(
        model=other,
        args=TrainingArguments(
            str(tmp_path), use_cpu=True, report_to="none", max_steps=5, max_grad_norm=0,
            per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
            lr_scheduler_type="constant", save_strategy="no", disable_tqdm=True,
            average_tokens_across_devices=False,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in IDS.tolist()],
        callbacks=[LiftCallback(memory=False)],
    ).train()  # fmt: skip
    for one, two in zip(lift_layers(model).values(), lift_layers(other).values(), strict=True):
        same = torch.isin(one.index.to_flat(), two.index.to_flat()).float().mean()
        assert same > 0.95


def test_it_goes_on_to_the_bit(base: Path, tmp_path: Path) -> None:
    whole, first = attached(base), attached(base)
    train(whole, 5)
    counted = train(first, 3)
    first.save_pretrained(tmp_path)
    second = load_adapter(load(base), tmp_path).train()
    train(second, 5, counted.done, counted.optimizer.state_dict())
    assert_same_layers(second, whole)


def test_a_step_that_is_not_finite_is_not_applied(base: Path) -> None:
    model = attached(base)
    counted = train(model, 4, bad=2)
    assert counted.guard.skipped == 1
    assert all(bool(layer.values.isfinite().all()) for layer in lift_layers(model).values())
    assert lift_state(model).refreshes == 2


def test_an_optimizer_that_cannot_follow_is_refused(base: Path) -> None:
    model = attached(base)
    values = [p for p in model.parameters() if p.requires_grad]
    Steps(model, SparseAdamW(values, lr=1e-3)).close()
    with pytest.raises(UserError, match="Adafactor"):
        Steps(model, torch.optim.Adafactor(values))
    with pytest.raises(UserError, match="no leanlift layers"):
        Steps(load(base, "dense"), torch.optim.AdamW(values))
