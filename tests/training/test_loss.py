"""The training loss against the model's own, over families whose logits are made in other ways."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from runs import ROWS, settings
from sweeps import swept
from tiny import load, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from leanlift import LiftConfig, LiftTrainer, UserError, get_lift_model
from leanlift.model import lift_layers, lifted
from leanlift.plan import PlanSettings, plan_memory
from leanlift.training import LiftSFTConfig
from leanlift.training.loss import TiledLoss, WholeLoss, objective_of, training_loss

LIFT = LiftConfig(density=0.1, selector="magnitude")
SIZES: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
RECURRENT = {
    "block_types": ["recurrent", "attention"],
    "lru_width": 64,
    "attention_window_size": 16,
}
MINICPM = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "dim_model_base": 6,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any], type]] = {
    "llama": ("llama", {}, TiledLoss),
    "gemma2: capped": ("gemma2", {}, TiledLoss),
    "granite: scaled": ("granite", {"logits_scaling": 13.0}, TiledLoss),
    "cohere: scaled": ("cohere", {}, TiledLoss),
    "minicpm3: a scale before the head": ("minicpm3", MINICPM, TiledLoss),
    "recurrent_gemma: a cap of another name": ("recurrent_gemma", RECURRENT, TiledLoss),
    "modernbert-decoder: a layer before the head": ("modernbert-decoder", {}, WholeLoss),
    "phi: a bias": ("phi", {}, TiledLoss),
    "opt: the decoder in the base is asked": (
        "opt",
        {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0},
        TiledLoss,
    ),
}


def attached(family: str, dtype: torch.dtype = torch.float32) -> Any:
    kind, changes, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **{**SIZES, **changes}), dtype=dtype
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    targets = ("gate_proj", "down_proj") if kind == "recurrent_gemma" else LIFT.target_modules
    return get_lift_model(model, replace(LIFT, target_modules=targets), progress=False)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 211, (3, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :5], labels[2, :9] = -100, -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_training_loss_is_the_model_s_own(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, args = attached(family, dtype), settings(tmp_path)
    loss = training_loss(model, args, None)
    assert type(loss) is FAMILIES[family][2]
    assert model.training
    model.eval()
    own = model(**batch()).loss
    own.backward()
    layers = lift_layers(model).values()
    wanted = torch.cat([layer.values.grad for layer in layers])
    model.zero_grad()
    got = loss(model, batch())
    got.backward()
    rounding = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert got.item() == pytest.approx(own.item(), rel=rounding)
    found = torch.cat([layer.values.grad for layer in layers])
    assert (found - wanted).norm() <= 3 * rounding * wanted.norm()
    assert loss.last is not None
    assert loss.last.mean_entropy.isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_cap_that_no_small_logit_shows_is_found(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lifted(attached("llama", dtype))
    assert type(training_loss(model, settings(tmp_path), None)) is TiledLoss
    stock = type(model).forward

    def capped(self: Any, **inputs: Any) -> Any:
        out = stock(self, **inputs)
        out.logits = 30 * torch.tanh(out.logits.float() / 30).to(out.logits.dtype)
        labels = inputs["labels"][:, 1:].reshape(-1)
        flat = out.logits[:, :-1].float().reshape(len(labels), -1)
        out.loss = torch.nn.functional.cross_entropy(flat, labels, ignore_index=-100)
        return out

    assert model(**batch()).logits.abs().max() < 3  # which the cap leaves nearly as they are
    monkeypatch.setattr(type(model), "forward", capped)
    assert type(training_loss(model, settings(tmp_path), None)) is WholeLoss


@pytest.mark.parametrize("family", ["llama", "granite: scaled"])
@pytest.mark.parametrize("name", ["label_smoothing_factor", "loss_type"])
def test_smoothing_and_dft_against_their_definitions(
    family: str, name: str, tmp_path: Path
) -> None:
    model = attached(family).eval()
    args = settings(tmp_path, **{name: 0.2 if name == "label_smoothing_factor" else "dft"})
    got = training_loss(model, args, None)(model, batch(), 11)
    logits = model(**batch()).logits[:, :-1].double().reshape(-1, 211)
    labels = batch()["labels"][:, 1:].reshape(-1)
    chances = logits.log_softmax(-1)[labels != -100]
    own = chances.gather(1, labels[labels != -100].unsqueeze(1)).squeeze(1)
    if name == "loss_type":
        wanted = -(own.exp() * own).sum() / 11
    else:
        wanted = (-0.8 * own - 0.2 * chances.mean(1)).sum() / 11
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)


def mixtral(vocabulary: int = 211) -> Any:
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": vocabulary, "num_local_experts": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **sizes))
    return get_lift_model(model, replace(LIFT, target_modules=("q_proj",)), progress=False)


def test_a_router_s_loss_is_left_to_trl_where_it_can_be_made(tmp_path: Path) -> None:
    model = mixtral()
    model.config.output_router_logits = True
    assert training_loss(model, settings(tmp_path), None) is None
    for family, reason in (("granite: scaled", "logits of this"), ("llama", "cannot make the")):
        other = attached(family)
        other.config.output_router_logits = True
        with pytest.raises(UserError, match=f"{reason}.*router_aux_loss_coef=0"):
            training_loss(other, settings(tmp_path), None)


@pytest.mark.parametrize("coefficient", [None, 0.0, 0.5])
def test_a_router_s_loss_is_off_unless_it_is_asked_for(
    tmp_path: Path, coefficient: float | None
) -> None:
    tokenizer = make_tokenizer()
    args = settings(tmp_path, router_aux_loss_coef=coefficient)
    trainer = LiftTrainer(
        model=mixtral(len(tokenizer)),
        args=args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
    )
    assert trainer.aux_loss_enabled == bool(coefficient)
    assert (type(trainer._loss) is TiledLoss) == (not coefficient)
    assert args.router_aux_loss_coef == coefficient  # as it was given, and is kept


@pytest.mark.parametrize("changed", ["unshifted", "more"])
def test_a_model_s_own_other_loss_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    changed: str,
) -> None:
    """What is trained on stays the cost of the next tokens."""
    model = lifted(attached("llama"))
    stock = type(model).forward
    wanted = stock(model.eval(), **batch()).loss.item()

    def other(self: Any, **inputs: Any) -> Any:
        out = stock(self, **inputs)
        if "labels" in inputs and changed == "unshifted":
            flat = out.logits.reshape(-1, out.logits.shape[-1])
            out.loss = torch.nn.functional.cross_entropy(flat, inputs["labels"].reshape(-1))
        elif "labels" in inputs:
            out.loss = out.loss + 0.1
        return out

    assert training_loss(model, settings(tmp_path), None) is not None
    assert "is not the cost of the next tokens" not in caplog.text
    monkeypatch.setattr(type(model), "forward", other)
    loss = training_loss(model, settings(tmp_path), None)
    assert type(loss) is TiledLoss
    assert "is not the cost of the next tokens" in caplog.text
    assert loss(model, batch()).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("accepts", [True, False])
def test_a_token_counts_alike_in_every_micro_batch(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accepts: bool
) -> None:
    """Whatever a model's own forward takes: our loss is divided by all trained tokens."""
    monkeypatch.setattr(LlamaForCausalLM, "accepts_loss_kwargs", accepts, raising=False)
    whole, parts = (
        logged(trainer_for(base, tmp_path / str(rows), per_device_train_batch_size=rows,
                           gradient_accumulation_steps=4 // rows))
        for rows in (4, 1)
    )  # fmt: skip
    assert whole == pytest.approx(parts, rel=1e-4)


def trainer_for(base: Path, output: Path, lift: LiftConfig = LIFT, **changes: Any) -> LiftTrainer:
    return LiftTrainer(
        model=get_lift_model(load(base), lift, progress=False),
        args=settings(output, max_steps=6, **changes),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS[:4]),
        processing_class=make_tokenizer(),
    )


@pytest.mark.parametrize("changes", [{}, {"loss_type": "dft"}], ids=["nll", "dft"])
def test_the_tiled_loss_is_trl_s(base: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    ours, theirs = (trainer_for(base, tmp_path / name, **changes) for name in "ab")
    theirs._loss = None
    ours.train()
    theirs.train()
    for one, other in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        for key in ("loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm"):
            assert (key in one) == (key in other)
            if key in one:
                assert float(one[key]) == pytest.approx(float(other[key]), rel=1e-4, abs=1e-6), key
    learned = [
        torch.cat([layer.values for layer in lift_layers(trainer.model).values()]).detach()
        for trainer in (ours, theirs)
    ]
    assert (learned[0] - learned[1]).norm() <= 1e-4 * learned[1].norm()


@pytest.mark.parametrize("name", ["label_smoothing_factor", "loss_type"])
def test_ends_in_int8_go_with_every_cost(base: Path, tmp_path: Path, name: str) -> None:
    ends = LiftConfig(density=0.1, selector="magnitude", quantize_embeddings=True)
    value = 0.1 if name == "label_smoothing_factor" else "dft"
    with pytest.warns(FutureWarning) if name.startswith("label") else nullcontext():
        trainer = trainer_for(base, tmp_path, ends, **{name: value})
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def logged(trainer: LiftTrainer, key: str = "loss") -> list[float]:
    trainer.train()
    return [float(entry[key]) for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("ends", [False, True], ids=["", "int8-ends"])
def test_noise_on_embeddings_is_noise(base: Path, tmp_path: Path, ends: bool) -> None:
    lift = replace(LIFT, quantize_embeddings=ends)
    plain, noisy = (
        logged(trainer_for(base, tmp_path / str(alpha), lift, neftune_noise_alpha=alpha))
        for alpha in (None, 50.0)
    )
    assert len(plain) == len(noisy) == 6
    assert max(abs(a - b) for a, b in zip(plain, noisy, strict=True)) > 0.01


def test_a_router_s_coefficient_weighs_its_loss(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    losses = {}
    for coefficient in (0.0, 0.5):
        trainer = LiftTrainer(
            model=mixtral(len(tokenizer)),
            args=settings(tmp_path, max_steps=1, router_aux_loss_coef=coefficient),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tokenizer,
        )
        losses[coefficient] = logged(trainer)[0]
        if coefficient:
            aux = trainer.state.log_history[0]["aux_loss"]
    assert losses[0.5] - losses[0.0] == pytest.approx(0.5 * aux, rel=1e-3)


def test_outputs_are_there_for_metrics(base: Path, tmp_path: Path) -> None:
    trainer = trainer_for(base, tmp_path)
    seen: list[tuple[int, ...]] = []

    def measured(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {"made_up": 1.0}

    trainer.compute_metrics = measured
    metrics = trainer.evaluate()
    assert metrics["eval_made_up"] == 1.0
    assert seen[0][0] == 4
    trainer.compute_metrics = None
    assert trainer.evaluate()["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("family", swept(["llama", "granite: scaled"], "llama"))
@pytest.mark.parametrize(
    "name", swept(["label_smoothing_factor", "loss_type"], "label_smoothing_factor")
)
def test_the_plan_has_the_loss_that_is_trained(family: str, name: str, tmp_path: Path) -> None:
    kind, changes, loss = FAMILIES[family]
    config = AutoConfig.for_model(kind, **{**SIZES, **changes, "vocab_size": 30_000})
    config.save_pretrained(tmp_path)
    settings = PlanSettings(
        per_device_train_batch_size=1, max_length=64, load_in_4bit=False, cuda=False,
        optim="sparse_adamw",
    )  # fmt: skip
    plain = plan_memory(tmp_path, LIFT, settings).step["loss"]
    whole = 64 * 30_000 * 4
    assert (plain > 2 * whole) == (loss is WholeLoss)
    args = LiftSFTConfig(
        output_dir="x", use_cpu=True, bf16=False,
        **{name: 0.2 if name == "label_smoothing_factor" else "dft"},
    )  # fmt: skip
    other = plan_memory(tmp_path, LIFT, settings, objective=objective_of(args)).step["loss"]
    assert plain <= other <= 1.5 * plain
