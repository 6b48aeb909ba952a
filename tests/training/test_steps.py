"""Updates in the backward pass, bf16 values, and steps that are not applied."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from runs import ROWS, assert_same_layers, settings
from tiny import load, make_checkpoint, make_tokenizer
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig

from leanlift import (
    LiftConfig,
    LiftTrainer,
    UserError,
    get_lift_model,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from leanlift.memory import static_categories
from leanlift.model import embedding_to_cpu, lift_layers, restore_adapter
from leanlift.optim import LARGEST_GRADIENT, SparseAdamW, adamw_nbytes, unwrap
from leanlift.sparse import index_nbytes
from leanlift.training import LiftSFTConfig, last_whole_checkpoint
from leanlift.training.steps import StepGuard, clip_to_norm_, total_norm

LIFT = LiftConfig(density=0.1, approx_rank=8, refresh_interval=4)
BF16 = LiftConfig(density=0.1, approx_rank=8, refresh_interval=4, values_dtype="bfloat16")


def trainer_for(
    base: Path, output: Path, lift: LiftConfig = LIFT, kind: Any = LiftTrainer, **changes: Any
) -> Any:
    options = {"optim": "sparse_adamw", "max_grad_norm": 0.0, "max_steps": 10, **changes}
    return kind(
        model=get_lift_model(load(base), lift, progress=False),
        args=settings(output, **options),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=make_tokenizer(),
    )


def learned(trainer: LiftTrainer) -> torch.Tensor:
    return torch.cat([layer.values for layer in lift_layers(trainer.model).values()]).detach()


# --- In the backward pass ------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("optim", ["sparse_adamw", "sparse_adamw_8bit"])
def test_updates_in_the_backward_pass_are_the_ordinary_ones_bit_for_bit(
    base: Path, tmp_path: Path, optim: str, checkpointing: bool
) -> None:
    ordinary, backward = (
        trainer_for(
            base,
            tmp_path / str(inside),
            optim=optim,
            optim_in_backward=inside,
            gradient_checkpointing=checkpointing,
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


def test_in_backward_no_two_gradients_exist_at_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(base, tmp_path, optim_in_backward=True, max_steps=2)
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
    trainer = trainer_for(
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
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps=4"),
        ({"max_grad_norm": 1.0}, "max_grad_norm=1.0"),
        ({"optim": "adamw_torch"}, "optim=adamw_torch"),
        (
            {"max_grad_norm": 0.5, "gradient_accumulation_steps": 2},
            "gradient_accumulation_steps=2 and max_grad_norm=0.5",
        ),
    ],
)
def test_in_backward_refuses_what_needs_all_gradients(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    options = {"optim": "sparse_adamw", "max_grad_norm": 0.0, **changes}
    with pytest.raises(UserError, match=rf"it cannot go with {named}: set optim=sparse_adamw"):
        settings(tmp_path, optim_in_backward=True, **options)


# --- bf16 values ---------------------------------------------------------------------------


def test_bf16_values_train_refresh_save_and_resume(base: Path, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 5, "optim": "sparse_adamw_8bit"}
    whole = trainer_for(base, tmp_path / "run", BF16, **saving)
    whole.train()
    layers = lift_layers(whole.model).values()
    assert all(layer.values.dtype == torch.bfloat16 for layer in layers)
    retired = [layer.retired_values for layer in layers if layer.retired_values is not None]
    assert retired
    assert all(values.dtype == torch.bfloat16 for values in retired)
    (tmp_path / "run" / "checkpoint-10").rename(tmp_path / "whole")
    resumed = trainer_for(base, tmp_path / "run", BF16, **saving)
    resumed.train(resume_from_checkpoint=True)
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "optimizer.json"):
        ours, theirs = (tmp_path / d / name for d in ("whole", "run/checkpoint-10"))
        assert ours.read_bytes() == theirs.read_bytes(), name
    fresh = load_adapter(load(base), tmp_path / "whole")
    assert_same_layers(whole.model, fresh)
    with pytest.raises(UserError, match="bfloat16 offsets, but the model trains float32 ones"):
        restore_adapter(trainer_for(base, tmp_path / "x").model, tmp_path / "whole")


def test_bf16_with_stochastic_rounding_learns_and_rounding_to_nearest_stalls(
    base: Path, tmp_path: Path
) -> None:
    """The band: at least nine tenths of the drop in loss that fp32 values reach; to nearest, less
    than half. The learning rate is small against the offsets' start, as late in a real run."""

    class Nearest(LiftTrainer):
        def create_optimizer(self, model: Any = None) -> Any:
            optimizer = super().create_optimizer(model)
            for group in optimizer.param_groups:
                group["rounding"] = "nearest"
            return optimizer

    def drop(kind: Any, dtype: str) -> float:
        lift = LiftConfig(density=0.5, approx_rank=8, values_dtype=dtype)
        trainer = trainer_for(
            base,
            tmp_path,
            lift,
            kind,
            max_steps=150,
            learning_rate=1e-4,
            warmup_steps=0,
            lr_scheduler_type="constant",
            per_device_train_batch_size=8,
        )
        for layer in lift_layers(trainer.model).values():
            layer.values.data.fill_(0.06)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return sum(losses[:5]) / 5 - sum(losses[-5:]) / 5

    exact = drop(LiftTrainer, "float32")
    stochastic, nearest = drop(LiftTrainer, "bfloat16"), drop(Nearest, "bfloat16")
    assert exact > 0.05
    assert stochastic >= 0.9 * exact
    assert nearest <= 0.5 * exact


def test_bf16_values_need_an_optimizer_that_rounds_stochastically(
    base: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="adamw_torch rounds small updates of bfloat16 values away"):
        trainer_for(base, tmp_path, BF16, optim="adamw_torch").train()
    with pytest.raises(UserError, match="values_dtype among"):
        LiftConfig(values_dtype="float16")


def test_a_plain_sftconfig_takes_sparse_adamw_as_an_object(base: Path, tmp_path: Path) -> None:
    model = get_lift_model(load(base), BF16, progress=False)
    trainer = LiftTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            max_steps=2,
            report_to="none",
            save_strategy="no",
            max_length=64,
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=make_tokenizer(),
        optimizers=(
            SparseAdamW([layer.values for layer in lift_layers(model).values()], lr=1e-2),
            None,
        ),
    )
    trainer.train()
    assert learned(trainer).abs().max() > 1e-3


# --- Steps that are not applied ------------------------------------------------------------


class Broken(LiftTrainer):
    """The loss of chosen steps (counted from 1) is NaN."""

    bad_steps: tuple[int, ...] = ()

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step + 1 in self.bad_steps:
            hook = model.lm_head.register_forward_hook(lambda m, i, out: out * float("nan"))
            norm = model.model.norm.register_forward_hook(lambda m, i, out: out * float("nan"))
            try:
                return super().compute_loss(model, inputs, *args, **kwargs)
            finally:
                hook.remove()
                norm.remove()
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("optim", ["adamw_torch", "sparse_adamw"])
@pytest.mark.parametrize("clip", [0.0, 1.0], ids=["unclipped", "clipped"])
def test_a_bad_step_is_not_applied_and_said_once(
    base: Path, tmp_path: Path, optim: str, clip: float, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_for(base, tmp_path, kind=Broken, optim=optim, max_grad_norm=clip)
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
    trainer = trainer_for(base, tmp_path, optim_in_backward=inside, max_steps=3)
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
    trainer = trainer_for(
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
    trainer = trainer_for(base, tmp_path, save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 10


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
        ("adamw_torch", 1.0, False, 3e38),
        ("adamw_8bit", 0.0, False, -1.1e19),
        ("sparse_adamw", 0.0, True, 1e20),
        ("sparse_adamw_8bit", 0.0, False, 3e38),
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
    trainer = trainer_for(base, tmp_path, kind=Spike, **options)
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
    dropped = trainer_for(base, tmp_path, kind=Spike, **options)
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

    trainer = trainer_for(
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


class At(TrainerCallback):
    """Calls a function at the end of one step."""

    def __init__(self, step: int, function: Any) -> None:
        self.step, self.function = step, function

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.function()


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
    trainer = trainer_for(
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
    again = trainer_for(
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


def test_offsets_that_are_not_finite_are_not_saved_over_good_ones(
    base: Path, tmp_path: Path
) -> None:
    fixed = LiftConfig(density=0.1, approx_rank=8)
    refreshed = trainer_for(base, tmp_path / "refreshed", LIFT)
    offsets = next(iter(lift_layers(refreshed.model).values())).values.data
    refreshed.add_callback(At(3, lambda: offsets[7].fill_(float("nan"))))
    with pytest.raises(UserError, match=r"stopped at step 4: offsets of .*q_proj are NaN"):
        refreshed.train()
    trainer = trainer_for(base, tmp_path / "run", fixed, save_strategy="steps", save_steps=2)
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
    trainer = trainer_for(base, tmp_path / "a", **options)
    seen: list[int] = []
    see = trainer.guard.see_gradient
    trainer.guard.see_gradient = lambda *args: (seen.append(1), see(*args))
    trainer.train()
    layers = lift_layers(trainer.model)
    assert len(seen) == 4 * len(layers)
    late = trainer_for(base, tmp_path / "b", **options)
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

    trainer = trainer_for(
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


# --- Quantized ends, and the tiled loss ----------------------------------------------------

ENDS = LiftConfig(density=0.1, approx_rank=8, quantize_ends=True)


def logits_of(model: Any) -> torch.Tensor:
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_quantized_ends_train_save_load_and_merge(tmp_path: Path, tied: bool) -> None:
    path = make_checkpoint(tmp_path / "base", tied=tied)
    trainer = trainer_for(path, tmp_path / "run", ENDS, max_steps=20, learning_rate=1e-2)
    losses = trainer.train()
    assert losses.training_loss < 4.5
    model = trainer.model
    embedding = model.get_input_embeddings().weight
    assert embedding.dtype == torch.int8
    assert (embedding.data_ptr() == model.get_output_embeddings().weight.data_ptr()) == tied
    save_adapter(model, tmp_path / "adapter")
    live = logits_of(model)
    assert torch.equal(logits_of(load_adapter(load(path), tmp_path / "adapter")), live)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype="float32", onto="quantized")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits_of(merged), live, rtol=1e-4, atol=1e-4)
    assert merged.config.tie_word_embeddings == tied
    merge_adapter(tmp_path / "adapter", tmp_path / "plain", dtype="float32", onto="original")
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert torch.equal(original.get_input_embeddings().weight, stock.get_input_embeddings().weight)


def test_an_embedding_on_the_cpu_changes_nothing_but_its_place(tmp_path: Path) -> None:
    untied = make_checkpoint(tmp_path / "untied", tied=False)
    usual = trainer_for(untied, tmp_path / "a", LIFT)
    apart = trainer_for(untied, tmp_path / "b", LIFT)
    embedding_to_cpu(apart.model)
    assert "storage" not in dict(apart.model.get_input_embeddings().named_children())
    usual.train()
    apart.train()
    assert_same_layers(usual.model, apart.model)
    tied = make_checkpoint(tmp_path / "tied", tied=True)
    with pytest.raises(UserError, match="tied to the output head"):
        embedding_to_cpu(get_lift_model(load(tied), LIFT, progress=False))


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
        trainer_for(base, tmp_path, activation_offloading=True)
