"""Gradients near the ends of float32: applied as float64 would, or dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import At, assert_same_layers, learned, sparse_trainer
from sweeps import thorough

from leanlift import (
    LiftConfig,
    LiftTrainer,
)
from leanlift.model import lift_layers
from leanlift.optim import LARGEST_GRADIENT, SparseAdamW, unwrap
from leanlift.training.step_guard import clip_to_norm_, total_norm


class Spike(LiftTrainer):
    """At step `at`, one entry of one layer's gradient is `size`."""

    at, size = 3, 1e20

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        layers = lift_layers(self.model)
        name = list(layers)[2]
        layer, here = layers[name], self.state.global_step + 1 == self.at
        original = type(layer).values_gradient

        def spiked(x: torch.Tensor, grad_y: torch.Tensor) -> torch.Tensor:
            gradient = original(layer, x, grad_y)
            if here:
                gradient[5] = self.size
            return gradient

        layer.values_gradient = spiked  # type: ignore[method-assign]
        return super().training_step(*args, **kwargs)


def moments_are_finite(trainer: LiftTrainer) -> bool:
    tensors = [
        tensor
        for state in unwrap(trainer.optimizer).state.values()
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
    ]
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


@pytest.mark.parametrize(
    ("optim", "clip", "inside", "size"),
    [
        ("adamw_torch", 0.0, False, 1e20),
        thorough(("adamw_torch", 1.0, False, 3e38)),
        thorough(("adamw_8bit", 0.0, False, -1.1e19)),
        ("sparse_adamw", 0.0, True, 1e20),
        thorough(("sparse_adamw_8bit", 0.0, False, 3e38)),
        ("sparse_adamw_8bit", 0.5, False, 1e20),
    ],
)
def test_a_gradient_that_float32_cannot_square_is_not_applied(
    base: Path,
    tmp_path: Path,
    optim: str,
    clip: float,
    inside: bool,
    size: float,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The run goes on as one whose third step was dropped, entry for entry."""
    options = {"optim": optim, "max_grad_norm": clip, "max_steps": 5, "optim_in_backward": inside}
    trainer = sparse_trainer(base, tmp_path, kind=Spike, **options)
    trainer.size = size
    trainer.train()
    assert trainer.guard.skipped == 1
    assert any(
        f"Step 3 is not applied: a gradient reaches {abs(size):.1e}" in line
        for line in caplog.messages
    )
    assert torch.isfinite(learned(trainer)).all()
    assert moments_are_finite(trainer)
    if inside:
        return  # what was updated before the spike stays updated
    dropped = sparse_trainer(base, tmp_path, kind=Spike, **options)
    dropped.size = float("nan")
    dropped.train()
    assert_same_layers(trainer.model, dropped.model)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_norm_that_float32_cannot_hold_is_no_harm(
    base: Path, tmp_path: Path, clip: float
) -> None:
    """Every square is finite and their sum is not: the step is applied, as float64 has it."""

    class Wide(Spike):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            if self.state.global_step + 1 == self.at:
                for layer in lift_layers(self.model).values():
                    layer.values.grad.fill_(9e18)
            return loss

    trainer = sparse_trainer(
        base, tmp_path, kind=Wide, optim="sgd", max_grad_norm=clip, max_steps=3, learning_rate=1e-20
        if not clip else 1.0, lift=LiftConfig(approx_rank=8), lr_scheduler_type="constant",
        warmup_steps=0,
    )  # fmt: skip
    trainer.size = 9e18
    before: list[torch.Tensor] = []
    trainer.add_callback(At(2, lambda: before.append(learned(trainer).double())))
    trainer.train()
    assert trainer.guard.skipped == 0
    moved = before[0] - learned(trainer).double()
    count = moved.numel()
    gradient = torch.full((count,), 9e18, dtype=torch.float64)
    wanted = gradient * 1e-20 if not clip else gradient * clip / (gradient.norm() + 1e-6)
    torch.testing.assert_close(moved, wanted, rtol=1e-3, atol=1e-6)
    norm = trainer.state.log_history[2]["grad_norm"]
    assert norm == pytest.approx(float(gradient.norm()), rel=1e-6)


@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_adam_of_the_largest_gradients_that_are_applied_is_that_of_float64(moments: str) -> None:
    """Entries from 1e-30 to 1e19 in turn: the update is what float64 gives."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-30, 18.99, 50, dtype=torch.float64).repeat_interleave(256)
    values = torch.nn.Parameter(torch.zeros(scale.numel()))
    optimizer = SparseAdamW([values], lr=1.0, eps=1e-40, moments=moments)
    first = second = torch.zeros_like(scale)
    for step in range(1, 6):
        gradient = scale * (0.5 + torch.rand(scale.shape, generator=generator, dtype=torch.float64))
        gradient = gradient.clamp(max=LARGEST_GRADIENT)
        before = values.detach().double()
        values.grad = gradient.float()
        optimizer.step()
        first = 0.9 * first + 0.1 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        wanted = first / (1 - 0.9**step) / (second / (1 - 0.95**step)).sqrt()
        moved = before - values.detach().double()
        seen = scale > 1e-15  # below, squares vanish in float32, as they do for any Adam
        band = 1e-5 if moments == "float32" else 0.1
        assert ((moved - wanted)[seen]).abs().max() <= band
        assert torch.isfinite(values).all()
    assert bool(torch.isfinite(optimizer.state[values].get("exp_avg_sq", torch.zeros(1))).all())


def test_norms_and_clipping_are_those_of_float64() -> None:
    for scale in (1e-30, 1e-3, 1.0, 1e18, 3e38):
        gradients = [torch.rand(1000) * scale, torch.rand(77) * scale, torch.zeros(3)]
        exact = torch.cat(gradients).double()
        assert float(total_norm(gradients)) == pytest.approx(float(exact.norm()), rel=1e-9)
        norm = clip_to_norm_(gradients, 1.0)
        assert float(norm) == pytest.approx(float(exact.norm()), rel=1e-9)
        wanted = exact * min(1.0, 1 / (float(exact.norm()) + 1e-6))
        torch.testing.assert_close(torch.cat(gradients).double(), wanted, rtol=1e-5, atol=1e-44)


@pytest.mark.parametrize("size", [1e20, float("inf")], ids=str)
def test_under_a_loss_scale_what_is_too_large_is_dropped_and_infinities_are_the_scalers(
    base: Path, tmp_path: Path, size: float
) -> None:
    trainer = sparse_trainer(
        base, tmp_path, kind=Spike, optim="adamw_torch", max_steps=5, save_strategy="steps",
        save_steps=4, fp16=True,
    )  # fmt: skip
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    trainer.accelerator.native_amp = True  # as accelerate has it on a GPU
    trainer.size = size
    trainer.train()
    assert torch.isfinite(learned(trainer)).all()
    assert moments_are_finite(trainer)
    assert trainer.guard.skipped == (1 if size == 1e20 else 0)
    assert {float(s["step"]) for s in unwrap(trainer.optimizer).state.values()} == {4.0}
    again = sparse_trainer(
        base, tmp_path, kind=Spike, optim="adamw_torch", max_steps=5, save_strategy="steps",
        save_steps=4, fp16=True,
    )  # fmt: skip
    again.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    again.accelerator.native_amp = True
    again.train(resume_from_checkpoint=True)
    assert again.accelerator.scaler.get_scale() == trainer.accelerator.scaler.get_scale()
    assert_same_layers(trainer.model, again.model)
    scale = tmp_path / "checkpoint-4" / "scaler.json"
    assert scale.is_file()
