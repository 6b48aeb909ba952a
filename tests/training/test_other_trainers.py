"""TRL's other trainers over a `LiftModel` with `LiftCallback`: they train as over any adapter
model, without a second base, and go on after a refresh to the bit."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from other_trainers import arguments, make, rows_of
from runs import assert_same_layers
from sweeps import swept
from tiny import load, make_tokenizer
from transformers import Trainer, TrainingArguments

from leanlift import (
    LiftCallback,
    LiftConfig,
    LiftModel,
    LiftSFTConfig,
    SparseAdamW,
    UserError,
    get_lift_model,
    load_adapter,
    reference_model,
)
from leanlift.measure import LiveBytes
from leanlift.model import lift_layers, lift_state

IDS = torch.arange(3, 43).reshape(2, 20)


def attached(base: Path, kind: str, **config: Any) -> LiftModel:
    return get_lift_model(load(base, kind), LiftConfig(approx_rank=8, **config), progress=False)


METHODS = ["sft", "dpo", "kto", "grpo", "rloo", "orpo", "cpo"]
CASES = [
    (method, kind, refresh, checkpointing)
    for method in METHODS
    for kind in ("nf4", "dense")
    for refresh in (2, 0)
    for checkpointing in (False, True)
]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("method", "kind", "refresh", "checkpointing"),
    swept(CASES, ("dpo", "nf4", 2, True)),
)
def test_a_trainer_trains_saves_and_goes_on(
    base: Path, tmp_path: Path, method: str, kind: str, refresh: int, checkpointing: bool
) -> None:
    options = {"gradient_checkpointing": checkpointing}
    model = attached(base, kind, refresh_interval=refresh)
    start = logits(model.train())
    trainer = make(method, model.train(), tmp_path / "run", **options)
    trainer.train()
    assert lift_state(model).refreshes == bool(refresh)
    assert not torch.equal(logits(model), start)
    with model.disable_adapter():
        assert torch.equal(logits(model), start)  # the reference
    files = {path.name for path in (tmp_path / "run" / "checkpoint-3").iterdir()}
    assert "adapter_model.safetensors" in files
    assert not {"model.safetensors", "pytorch_model.bin", "config.json"} & files
    trainer.save_model(str(tmp_path / "saved"))
    again = load_adapter(load(base, kind), tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    report = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert report["categories"]["values"] == sum(
        layer.values.nbytes for layer in lift_layers(model).values()
    )

    other = make(
        method, attached(base, kind, refresh_interval=refresh), tmp_path / "run", **options
    )
    other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert_same_layers(other.model, trainer.model)
    one, two = (t.optimizer.state_dict()["state"] for t in (trainer, other))
    for key, state in one.items():
        assert all(torch.equal(state[name], two[key][name]) for name in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("method", swept(["dpo", "kto", "grpo", "rloo"], "dpo"))
def test_no_second_base_is_loaded(base: Path, tmp_path: Path, method: str) -> None:
    model = attached(base, "nf4")
    whole = sum(p.nbytes for p in model.parameters())
    gc.collect()
    with LiveBytes() as live:
        trainer = make(method, model, tmp_path)
    assert getattr(trainer, "ref_model", None) is None
    assert live.peak < whole / 20
    assert all(not layer.shelf["ref"].index.count for layer in lift_layers(model).values()
               if "ref" in layer.shelf)  # fmt: skip


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "continued"])
def test_the_first_loss_of_dpo_is_ln_2(base: Path, tmp_path: Path, trained: bool) -> None:
    """Policy and reference are one, whether an adapter begins or is trained on."""
    model = attached(base, "nf4")
    if trained:
        torch.manual_seed(1)
        for layer in lift_layers(model).values():
            layer.values.data.normal_(std=0.05)
    trainer = make("dpo", model, tmp_path, max_steps=1, save_strategy="no")
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.thorough
def test_a_reference_that_is_given_is_taken(base: Path, tmp_path: Path) -> None:
    model = attached(base, "nf4")
    losses = []
    for reference in (None, "given"):
        other = reference_model(model) if reference else None
        trainer = trl.DPOTrainer(
            model=attached(base, "nf4") if reference is None else model,
            ref_model=other,
            args=trl.DPOConfig(**arguments("dpo", tmp_path, save_strategy="no")),
            train_dataset=rows_of("dpo"),
            processing_class=make_tokenizer(),
        )
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == losses[1]


def test_without_the_callback_a_refresh_is_asked_for(base: Path, tmp_path: Path) -> None:
    trainer = make("dpo", attached(base, "nf4", refresh_interval=2), tmp_path, callbacks=[])
    with pytest.raises(UserError, match=r"every 2 steps by LiftTrainer or LiftCallback alone"):
        trainer.train()


def test_the_callback_says_what_cannot_be(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no leanlift layers"):
        make("sft", load(base, "dense"), tmp_path)
    refreshed = attached(base, "nf4", refresh_interval=2)
    with pytest.raises(UserError, match="Adafactor"):
        make("sft", refreshed, tmp_path, optim="adafactor").train()
    bf16 = attached(base, "nf4", values_dtype="bfloat16")
    with pytest.raises(UserError, match="bfloat16"):
        make("sft", bf16, tmp_path, optim="adamw_torch").train()


@pytest.mark.parametrize("kind", swept(["nf4", "dense"], "nf4"))
def test_bf16_values_and_our_optimizer_in_another_trainer(
    base: Path, tmp_path: Path, kind: str
) -> None:
    model = attached(base, kind, values_dtype="bfloat16", refresh_interval=2)
    optimizer = SparseAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(**arguments("dpo", tmp_path)),
        train_dataset=rows_of("dpo"),
        processing_class=make_tokenizer(),
        optimizers=(optimizer, None),
        callbacks=[LiftCallback()],
    )
    trainer.train()
    assert {layer.values.dtype for layer in lift_layers(model).values()} == {torch.bfloat16}
    assert lift_state(model).refreshes == 1


def test_a_step_that_is_not_finite_is_not_applied(base: Path, tmp_path: Path) -> None:
    model = attached(base, "nf4")
    callback = LiftCallback(max_nonfinite_steps=2)
    trainer = make("sft", model, tmp_path, [callback], save_strategy="no")
    norm = model.get_base_model().model.norm
    hook = norm.register_forward_hook(
        lambda m, i, out: out * float("nan") if trainer.state.global_step == 1 else out
    )
    trainer.train()
    hook.remove()
    assert callback.guard.skipped == 1
    assert all(bool(layer.values.isfinite().all()) for layer in lift_layers(model).values())


def test_transformers_own_trainer(base: Path, tmp_path: Path) -> None:
    model = attached(base, "nf4", refresh_interval=2)
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in IDS.repeat(8, 1)]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(tmp_path), use_cpu=True, report_to="none", max_steps=4, save_steps=2,
            learning_rate=1e-2, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2,
        ),
        train_dataset=rows,
        eval_dataset=rows[:2],
        callbacks=[LiftCallback()],
    )  # fmt: skip
    before = logits(model)
    trainer.train()
    best = load_adapter(load(base, "nf4"), trainer.state.best_model_checkpoint)
    assert torch.equal(logits(best), logits(model))
    assert not torch.equal(logits(model), before)
    assert [row["step"] for row in trainer.state.log_history if "refresh_churn" in row] == [2]


@pytest.mark.thorough
def test_lift_trainer_is_trl_s_with_the_callback(base: Path, tmp_path: Path) -> None:
    """The same rows, seed and optimizer: the same offsets, within rounding of the loss's tiles."""
    from leanlift import LiftTrainer

    given = {**arguments("sft", tmp_path / "ours"), "save_strategy": "no"}
    ours = LiftTrainer(
        model=attached(base, "dense", refresh_interval=2),
        args=LiftSFTConfig(**given, warmup_steps=0),
        train_dataset=rows_of("sft"),
        processing_class=make_tokenizer(),
    )
    ours.train()
    stock = make(
        "sft", attached(base, "dense", refresh_interval=2), tmp_path / "stock",
        save_strategy="no", adam_beta2=0.95, adam_epsilon=1e-6,
    )  # fmt: skip
    stock.train()
    for one, two in zip(
        lift_layers(ours.model).values(), lift_layers(stock.model).values(), strict=True
    ):
        same = torch.isin(one.index.to_flat(), two.index.to_flat())
        assert same.float().mean() > 0.95
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (ours, stock)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
