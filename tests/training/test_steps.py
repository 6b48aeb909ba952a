"""Steps that are not applied, and what is said of them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from runs import LIFT, ROWS, At, Broken, learned, settings, sparse_trainer
from tiny import load, make_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from leanlift import (
    LiftConfig,
    LiftTrainer,
    UserError,
    get_lift_model,
    save_adapter,
)
from leanlift.model import lift_layers
from leanlift.optim import unwrap
from leanlift.training import LiftSFTConfig, last_whole_checkpoint
from leanlift.training.step_guard import StepGuard


@pytest.mark.parametrize("optim", ["adamw_torch", "sparse_adamw"])
@pytest.mark.parametrize("clip", [0.0, 1.0], ids=["unclipped", "clipped"])
def test_a_bad_step_is_not_applied_and_said_once(
    base: Path, tmp_path: Path, optim: str, clip: float, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = sparse_trainer(base, tmp_path, kind=Broken, optim=optim, max_grad_norm=clip)
    trainer.bad_steps = (3, 4)
    with caplog.at_level(logging.WARNING, "leanlift"):
        trainer.train()
    said = [record.getMessage() for record in caplog.records if "not applied" in record.message]
    assert len(said) == 1
    assert said[0].startswith("Step 3 is not applied: the loss is nan (in the backward pass first")
    assert "layers.1.mlp.down_proj" in said[0]
    assert trainer.guard.skipped == 2
    steps = {float(s["step"]) for s in unwrap(trainer.optimizer).state.values()}
    assert steps == {8.0}
    assert torch.isfinite(learned(trainer)).all()
    assert trainer.state.global_step == 10


@pytest.mark.parametrize("inside", [False, True], ids=["ordinary", "in-backward"])
def test_an_infinite_gradient_under_a_finite_loss_names_its_layer(
    base: Path, tmp_path: Path, inside: bool, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = sparse_trainer(base, tmp_path, optim_in_backward=inside, max_steps=3)
    layers = lift_layers(trainer.model)
    name = list(layers)[3]
    original = type(layers[name]).values_gradient
    calls = []

    def broken(x: torch.Tensor, grad_y: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        gradient = original(layers[name], x, grad_y)
        return gradient * float("inf") if len(calls) == 2 else gradient

    layers[name].values_gradient = broken  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING, "leanlift"):
        trainer.train()
    said = [record.getMessage() for record in caplog.records if "not applied" in record.message]
    assert said == [
        "Step 2 is not applied: a gradient is not finite (in the backward pass first seen at "
        f"{name}). Training goes on; should it happen again, lower learning_rate."
    ]
    state = unwrap(trainer.optimizer).state
    taken = {key: int(state[layer.values]["step"]) for key, layer in layers.items()}
    assert taken[name] == 2
    if not inside:
        assert set(taken.values()) == {2}
    assert torch.isfinite(learned(trainer)).all()


@pytest.mark.parametrize("inside", [False, True], ids=["ordinary", "in-backward"])
def test_too_many_bad_steps_stop_the_run_and_keep_the_checkpoint(
    base: Path, tmp_path: Path, inside: bool
) -> None:
    trainer = sparse_trainer(
        base,
        tmp_path,
        kind=Broken,
        optim_in_backward=inside,
        save_strategy="steps",
        save_steps=2,
        max_nonfinite_steps=2,
    )
    trainer.bad_steps = (3, 5, 6, 7)
    with pytest.raises(
        UserError, match=r"stopped at step 6: the loss is nan.*2 step.*checkpoint-4"
    ):
        trainer.train()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert torch.isfinite(learned(trainer)).all()
    steps = {float(s["step"]) for s in unwrap(trainer.optimizer).state.values()}
    assert steps == {3.0}  # 1, 2 and 4
    trainer = sparse_trainer(base, tmp_path, save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 10


def test_offsets_that_are_not_finite_are_not_saved_over_good_ones(
    base: Path, tmp_path: Path
) -> None:
    fixed = LiftConfig(density=0.1, approx_rank=8)
    refreshed = sparse_trainer(base, tmp_path / "refreshed", LIFT)
    offsets = next(iter(lift_layers(refreshed.model).values())).values.data
    refreshed.add_callback(At(3, lambda: offsets[7].fill_(float("nan"))))
    with pytest.raises(UserError, match=r"stopped at step 4: offsets of .*q_proj are NaN"):
        refreshed.train()
    trainer = sparse_trainer(base, tmp_path / "run", fixed, save_strategy="steps", save_steps=2)
    layers = lift_layers(trainer.model)
    trainer.add_callback(At(3, lambda: layers[list(layers)[1]].values.data[7].fill_(float("inf"))))
    save_adapter(trainer.model, tmp_path / "good")
    before = (tmp_path / "good" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"step 4 is not written: .*infinite.*is .*checkpoint-2\."):
        trainer.train()
    assert last_whole_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-2")
    for name, layer in layers.items():
        for bad in (float("nan"), float("-inf")):
            layer.values.data[0] = bad
            with pytest.raises(UserError, match=r"values of this model holds NaN or infinite"):
                save_adapter(trainer.model, tmp_path / "good")
        layer.values.data.zero_()
        assert name in layers
    assert (tmp_path / "good" / "adapter_model.safetensors").read_bytes() == before


def test_beginning_again_with_a_smaller_batch_leaves_one_hook_per_matrix(
    base: Path, tmp_path: Path
) -> None:
    class Small(LiftTrainer):
        fails_at, calls = (0,), 0

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls - 1 in self.fails_at:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return super().training_step(*args, **kwargs)

    options = {"kind": Small, "auto_find_batch_size": True, "max_steps": 4}
    trainer = sparse_trainer(base, tmp_path / "a", **options)
    seen: list[int] = []
    see = trainer.guard.see_gradient
    trainer.guard.see_gradient = lambda *args: (seen.append(1), see(*args))
    trainer.train()
    layers = lift_layers(trainer.model)
    assert len(seen) == 4 * len(layers)
    late = sparse_trainer(base, tmp_path / "b", **options)
    late.fails_at = (2,)
    with pytest.raises(UserError, match="ran out of memory after 2 steps"):
        late.train()
    layers = lift_layers(late.model)
    assert not any(layer.values._post_accumulate_grad_hooks for layer in layers.values())


def test_accumulated_steps_are_dropped_whole(base: Path, tmp_path: Path) -> None:
    class OneMicroBatch(LiftTrainer):
        calls = 0

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.calls == 4 else loss

    trainer = sparse_trainer(
        base, tmp_path, kind=OneMicroBatch, gradient_accumulation_steps=3, max_steps=4
    )
    # the factor is applied after the guard has looked: the gradients alone show it
    trainer.train()
    assert trainer.guard.skipped == 1
    assert {float(s["step"]) for s in unwrap(trainer.optimizer).state.values()} == {3.0}


def test_a_good_step_in_between_starts_the_count_again() -> None:
    guard = StepGuard(2)
    nan, fine = torch.tensor(float("nan")), torch.tensor(1.0)
    for step, loss in enumerate((nan, fine, nan, fine), start=1):
        guard.see_loss(loss)
        assert guard.end_step(step, lambda: "") == bool(loss == 1)
    guard.see_loss(-torch.tensor(float("inf")))
    assert not guard.end_step(5, lambda: "")
    guard.see_loss(nan)
    with pytest.raises(UserError, match="at step 6: the loss is nan, and 2 step"):
        guard.end_step(6, lambda: "there is no checkpoint yet")
    with pytest.raises(
        UserError, match="expected max_nonfinite_steps as a whole number, at least 1"
    ):
        LiftSFTConfig(output_dir="x", max_nonfinite_steps=0, use_cpu=True, bf16=False)


def test_a_gradient_is_looked_at_in_one_operation() -> None:
    class Counted(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    def operations(layers: int) -> int:
        guard = StepGuard(3)
        with Counted() as counted:
            for number in range(layers):
                guard.see_gradient(str(number), torch.ones(300, dtype=torch.bfloat16))
            assert guard.end_step(1, lambda: "")
        return counted.count - layers  # the gradients were made there, too

    assert operations(40) - operations(10) == 30


def test_a_second_gpu_is_left_alone(base: Path, tmp_path: Path) -> None:
    args = settings(tmp_path, max_steps=1)
    args._n_gpu = 2  # as where Trainer finds two
    trainer = LiftTrainer(
        model=get_lift_model(load(base), LIFT, progress=False),
        args=args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=make_tokenizer(),
    )
    assert trainer.args.n_gpu == 1


def test_offloading_without_a_gpu_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="activation_offloading moves activations from a GPU"):
        sparse_trainer(base, tmp_path, activation_offloading=True)
