"""Updates in the backward pass are the ordinary ones, and hold one gradient at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from runs import LIFT, ROWS, assert_same_layers, learned, settings, sparse_trainer
from sweeps import swept
from tiny import load, make_tokenizer

from leanlift import (
    LiftConfig,
    LiftTrainer,
    UserError,
    get_lift_model,
)
from leanlift.measure import static_categories
from leanlift.model import lift_layers, stream_base
from leanlift.optim import SparseAdamW, adamw_nbytes, unwrap
from leanlift.sparse import index_nbytes


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("checkpointing", swept([False, True], True), ids=["plain", "checkpointed"])
@pytest.mark.parametrize("optim", swept(["sparse_adamw", "sparse_adamw_8bit"], "sparse_adamw_8bit"))
def test_updates_in_the_backward_pass_are_the_ordinary_ones_bit_for_bit(
    base: Path, tmp_path: Path, optim: str, checkpointing: bool, times: int
) -> None:
    ordinary, backward = (
        sparse_trainer(
            base,
            tmp_path / str(inside),
            optim=optim,
            optim_in_backward=inside,
            gradient_checkpointing=checkpointing,
            gradient_accumulation_steps=times,
        )
        for inside in (False, True)
    )
    ordinary.train()
    backward.train()
    assert_same_layers(ordinary.model, backward.model)
    assert learned(ordinary).abs().max() > 1e-3
    pairs = zip(
        lift_layers(ordinary.model).values(), lift_layers(backward.model).values(), strict=True
    )
    for one, other in pairs:
        state = unwrap(ordinary.optimizer).state[one.values]
        twin = unwrap(backward.optimizer).state[other.values]
        assert state.keys() == twin.keys()
        assert all(torch.equal(state[key], twin[key]) for key in state)
    logs = [entry for entry in backward.state.log_history if "loss" in entry]
    assert logs
    assert not any("grad_norm" in entry for entry in logs)


class Shortened(LiftTrainer):
    """The loss of every second micro-batch goes through the first block alone."""

    calls = 0

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls % 2:
            return super().compute_loss(model, inputs, *args, **kwargs)
        self.guard.see_loss(torch.zeros(()))  # as the loss of a micro-batch is seen
        asked = {"input_ids": inputs["input_ids"], "output_hidden_states": True}
        return model(**asked, use_cache=False).hidden_states[1].square().mean()


@pytest.mark.parametrize("streams", [False, True], ids=["resident", "streamed"])
def test_what_the_last_micro_batch_does_not_reach_is_updated_at_its_step(
    base: Path, tmp_path: Path, streams: bool
) -> None:
    trainers = []
    for inside in (False, True):
        model = load(base)
        if streams and inside:
            stream_base(model, torch.device("cpu"), state=True)
        trainers.append(
            Shortened(
                model=get_lift_model(model, LIFT, progress=False),
                args=settings(
                    tmp_path / str(inside), optim="sparse_adamw", max_grad_norm=0.0, max_steps=3,
                    optim_in_backward=inside, gradient_accumulation_steps=2,
                ),
                train_dataset=Dataset.from_list(ROWS),
                processing_class=make_tokenizer(),
            )
        )  # fmt: skip
        trainers[-1].train()
    assert_same_layers(trainers[0].model, trainers[1].model)
    assert all(layer.values.any() for layer in lift_layers(trainers[1].model).values())


def test_in_backward_no_two_gradients_exist_at_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = sparse_trainer(base, tmp_path, optim_in_backward=True, max_steps=2)
    layers = lift_layers(trainer.model)
    seen = []
    step = SparseAdamW.step_parameter

    def counting(self: SparseAdamW, parameter: torch.Tensor, apply: torch.Tensor) -> None:
        seen.append(sum(layer.values.grad is not None for layer in layers.values()))
        step(self, parameter, apply)

    monkeypatch.setattr(SparseAdamW, "step_parameter", counting)
    trainer.train()
    assert seen == [1] * 2 * len(layers)
    assert all(layer.values.grad is None for layer in layers.values())
    for layer in layers.values():  # the hooks are off again
        layer.values.sum().backward()
        assert layer.values.grad is not None
    assert len(seen) == 2 * len(layers)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_per_trained_entry(base: Path, tmp_path: Path, dtype: str) -> None:
    """At 5 % of 4096 x 11008, from the rules that other tests hold against real tensors, and the
    live tensors of a small model between two steps in the backward pass."""
    shape, count = (4096, 11008), int(0.05 * 4096 * 11008)
    assert index_nbytes(shape, count) <= 1.25 * count
    assert adamw_nbytes(count, "8bit") <= 2.1 * count
    lift = LiftConfig(density=0.1, approx_rank=8, values_dtype=dtype)
    trainer = sparse_trainer(
        base, tmp_path, lift, optim="sparse_adamw_8bit", optim_in_backward=True, max_steps=2
    )
    trainer.train()
    categories = static_categories(trainer.model)
    entries = sum(layer.index.count for layer in lift_layers(trainer.model).values())
    assert categories["values"] == entries * (4 if dtype == "float32" else 2)
    assert categories["gradients"] == 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm=1.0"),
        ({"optim": "adamw_torch"}, "optim=adamw_torch"),
        (
            {"max_grad_norm": 0.5, "optim": "adamw_torch"},
            "optim=adamw_torch and max_grad_norm=0.5",
        ),
    ],
)
def test_in_backward_refuses_what_needs_all_gradients(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    options = {"optim": "sparse_adamw", "max_grad_norm": 0.0, **changes}
    with pytest.raises(UserError, match=rf"it cannot go with {named}: set optim=sparse_adamw"):
        settings(tmp_path, optim_in_backward=True, **options)
