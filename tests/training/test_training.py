"""LiftTrainer on the path that a user takes, against a plain dense simulation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from runs import ROWS, assert_same_layers, settings, trainer_for
from sweeps import swept
from tiny import load, make_tokenizer

from leanlift import LiftConfig, LiftTrainer, UserError, get_lift_model, load_adapter
from leanlift.model import lift_layers, lifted
from leanlift.training import last_whole_checkpoint


def test_an_interrupted_run_ends_with_the_same_adapter_bit_for_bit(
    base: Path, tmp_path: Path
) -> None:
    lift = LiftConfig(approx_rank=8, refresh_interval=4)
    whole = trainer_for(
        base, tmp_path / "run", lift, max_steps=10, save_strategy="steps", save_steps=5
    )
    whole.train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-10")
    resumed = trainer_for(
        base, tmp_path / "run", lift, max_steps=10, save_strategy="steps", save_steps=5
    )
    resumed.train(resume_from_checkpoint=True)
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "optimizer.json"):
        assert (tmp_path / "run" / "checkpoint-5" / name).is_file()
    assert_same_layers(whole.model, resumed.model)
    whole.save_model(str(tmp_path / "a"))
    resumed.save_model(str(tmp_path / "b"))
    one, other = (tmp_path / d / "adapter_model.safetensors" for d in "ab")
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    "optim",
    swept(
        [
            "adamw_torch",
            "adamw_torch_fused",
            "adamw_8bit",
            "paged_adamw_8bit",
            "paged_adamw_32bit",
            "sparse_adamw",
            "sparse_adamw_8bit",
        ],
        "adamw_torch",
        "paged_adamw_8bit",
        "sparse_adamw_8bit",
    ),
)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_every_supported_optimizer_trains_and_follows_a_refresh(
    base: Path, tmp_path: Path, optim: str
) -> None:
    lift = LiftConfig(density=0.5, approx_rank=8, refresh_interval=3)
    trainer = trainer_for(base, tmp_path, lift, optim=optim, max_steps=12, learning_rate=3e-3)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05
    assert len(trainer.refreshes) == 3


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_and_accumulation_change_nothing_but_rounding(
    base: Path, tmp_path: Path, reentrant: bool
) -> None:
    lift = LiftConfig(approx_rank=8)
    plain = trainer_for(base, tmp_path / "a", lift, per_device_train_batch_size=8)
    plain.train()
    lean = trainer_for(
        base,
        tmp_path / "b",
        lift,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    lean.train()
    for (name, one), two in zip(
        lift_layers(plain.model).items(), lift_layers(lean.model).values(), strict=True
    ):
        assert (one.values - two.values).norm() <= 1e-3 * one.values.norm(), name


def test_accumulation_divides_by_the_trained_tokens_of_the_whole_window(
    base: Path, tmp_path: Path
) -> None:
    """One step of plain SGD shows the gradient itself; the rows' completions differ in length, so
    a mean of means would be another one."""
    rows = [{"prompt": f"{i} is ", "completion": "1" * (1 + 5 * (i % 4))} for i in range(8)]

    def values(batch: int, accumulate: int) -> torch.Tensor:
        trainer = LiftTrainer(
            model=get_lift_model(load(base), LiftConfig(approx_rank=8), progress=False),
            args=settings(
                tmp_path / str(batch),
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulate,
                max_steps=1,
                optim="sgd",
                learning_rate=1.0,
                warmup_steps=0,
                max_grad_norm=0,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=make_tokenizer(),
        )
        trainer.train()
        return torch.cat([layer.values for layer in lift_layers(trainer.model).values()]).detach()

    whole = values(8, 1)
    assert whole.norm() > 0
    for batch, accumulate in ((4, 2), (2, 4), (1, 8), (3, 3)):
        assert (values(batch, accumulate) - whole).norm() <= 1e-5 * whole.norm()


def test_evaluation_logs_a_loss(base: Path, tmp_path: Path) -> None:
    model = get_lift_model(load(base), LiftConfig(approx_rank=8), progress=False)
    trainer = LiftTrainer(
        model=model,
        args=settings(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS[:4]),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 2


def test_a_checkpoint_that_is_not_whole_is_passed_over(base: Path, tmp_path: Path) -> None:
    trainer = trainer_for(
        base,
        tmp_path,
        LiftConfig(approx_rank=8),
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
    )
    trainer.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    weights = tmp_path / "checkpoint-6" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    state = tmp_path / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:-5])
    assert last_whole_checkpoint(tmp_path) is None


def test_a_failed_save_leaves_no_half_checkpoint(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(
        base, tmp_path, LiftConfig(approx_rank=8), save_strategy="steps", save_steps=2
    )

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(trainer, "_save_rng_state", fail)
    with pytest.raises(UserError, match=r"checkpoint of step 2 could not be written \(disk full\)"):
        trainer.train()
    assert list(tmp_path.glob("checkpoint-*")) == []
    assert not (tmp_path / ".saving").exists()


def test_rows_over_max_length_are_counted_and_hopeless_ones_refused(
    base: Path, tmp_path: Path
) -> None:
    model = get_lift_model(load(base), LiftConfig(approx_rank=8), progress=False)
    rows = [
        *ROWS[:4],
        {"prompt": "x" * 100, "completion": "y"},
        {"prompt": "a", "completion": "b" * 90},
    ]

    def build(rows: list[dict[str, str]]) -> LiftTrainer:
        return LiftTrainer(
            model=model,
            args=settings(tmp_path),
            train_dataset=Dataset.from_list(rows),
            processing_class=make_tokenizer(),
        )

    report = build(rows).length_reports["train"]
    assert (report.rows, report.truncated, report.untrained, report.longest) == (6, 2, 1, 102)
    with pytest.raises(UserError, match="none of the 1 train examples has a token to train on"):
        build([rows[4]])


CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_only_the_assistants_words_are_trained(base: Path, tmp_path: Path, packing: bool) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    turns = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": "3+3?"},
        {"role": "assistant", "content": "six"},
    ]
    trainer = LiftTrainer(
        model=get_lift_model(load(base), LiftConfig(approx_rank=8), progress=False),
        args=settings(tmp_path, max_steps=2, packing=packing),
        train_dataset=Dataset.from_list([{"messages": turns}] * 4),
        processing_class=tokenizer,
    )
    trained: set[str] = set()
    for row in trainer.train_dataset:
        kept = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label >= 0]
        trained.update(tokenizer.decode(kept).split("</s>"))
    assert trained == {"four", "six", ""}
    trainer.train()


def test_the_trainer_refuses_what_it_cannot_train(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no leanlift layers"):
        LiftTrainer(
            model=load(base), args=settings(tmp_path), train_dataset=Dataset.from_list(ROWS)
        )
    refreshed = LiftConfig(approx_rank=8, refresh_interval=2)
    with pytest.raises(UserError, match="cannot move the state of SGD"):
        trainer_for(base, tmp_path, refreshed, optim="sgd")
    model = get_lift_model(load(base), refreshed, progress=False)
    given = LiftTrainer(
        model=model,
        args=settings(tmp_path),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=make_tokenizer(),
        optimizers=(torch.optim.SGD([p for p in model.parameters() if p.requires_grad]), None),
    )
    with pytest.raises(UserError, match="cannot move the state of SGD"):
        given.train()
    trainer = trainer_for(base, tmp_path, LiftConfig(approx_rank=8), optim="sgd", max_steps=1)
    trainer.train()  # without a refresh any optimizer will do


def test_a_checkpoint_holds_the_adapter_and_never_the_base(base: Path, tmp_path: Path) -> None:
    trainer = trainer_for(
        base, tmp_path, LiftConfig(approx_rank=8), save_strategy="steps", save_steps=6
    )
    trainer.train()
    files = {path.name for path in (tmp_path / "checkpoint-6").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "trainer_state.json"} <= files
    assert not any(name.startswith(("model", "pytorch_model", "README")) for name in files)
    config = json.loads((tmp_path / "checkpoint-6" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    model = load_adapter(load(base), tmp_path / "checkpoint-6")
    assert_same_layers(model, trainer.model)


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
def test_no_gradient_of_the_input_is_formed_that_nobody_needs(
    base: Path, tmp_path: Path, reentrant: bool
) -> None:
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    trainer = trainer_for(
        base,
        tmp_path,
        LiftConfig(approx_rank=8),
        max_steps=2,
        gradient_checkpointing=True,
        **options,
    )
    seen = []
    embedding = trainer.model.get_input_embeddings()
    norm = lifted(trainer.model).model.layers[0].input_layernorm
    norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].requires_grad))
    trainer.train()
    assert embedding.weight.requires_grad is False
    assert any(seen) == reentrant
    assert all(layer.values.abs().max() > 0 for layer in lift_layers(trainer.model).values())
