"""What `LiftCallback` and `Steps` take on, and what they leave behind, in trainers of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from other_trainers import arguments, make, rows_of
from tiny import load, make_tokenizer
from transformers import TrainerCallback

from leanlift import (
    LiftCallback,
    LiftConfig,
    LiftModel,
    LiftSFTConfig,
    LiftTrainer,
    Steps,
    UserError,
    get_lift_model,
)
from leanlift.model import lift_layers, lift_state

IDS = torch.arange(3, 43).reshape(2, 20)
PLAIN = {"save_strategy": "no", "max_steps": 4}


def attached(base: Path, **config: Any) -> LiftModel:
    settings = LiftConfig(approx_rank=8, **config)
    return get_lift_model(load(base, "nf4"), settings, progress=False)


def sft(model: Any, output: Path, callbacks: Any = None, **changes: Any) -> Any:
    return make("sft", model, output, callbacks, **{**PLAIN, **changes})


def ours(model: Any, output: Path, **more: Any) -> LiftTrainer:
    return LiftTrainer(
        model=model,
        args=LiftSFTConfig(**{**arguments("sft", output), **PLAIN}, warmup_steps=0),
        train_dataset=rows_of("sft"),
        processing_class=make_tokenizer(),
        **more,
    )


@pytest.mark.parametrize("first", ["callback", "LiftTrainer", "loop"])
def test_whoever_trains_next_is_asked_again(base: Path, tmp_path: Path, first: str) -> None:
    """That one trainer knew of the mask says nothing of another."""
    model = attached(base, refresh_interval=2)
    if first == "loop":
        Steps(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])).close()
    else:
        make_one = sft if first == "callback" else ours
        make_one(model, tmp_path / "first").train()
        assert lift_state(model).refreshes == 1
    with pytest.raises(UserError, match="every 2 steps by LiftTrainer or LiftCallback alone"):
        sft(model, tmp_path / "second", callbacks=[]).train()


@pytest.mark.parametrize("twice", ["callbacks", "LiftTrainer"])
def test_twice_is_once(base: Path, tmp_path: Path, twice: str) -> None:
    one, two = attached(base, refresh_interval=2), attached(base, refresh_interval=2)
    if twice == "callbacks":
        sft(one, tmp_path / "one").train()
        sft(two, tmp_path / "two", [LiftCallback(), LiftCallback(memory=False)]).train()
    else:
        ours(one, tmp_path / "one").train()
        ours(two, tmp_path / "two", callbacks=[LiftCallback()]).train()
    assert lift_state(one).refreshes == lift_state(two).refreshes == 1
    for first, second in zip(lift_layers(one).values(), lift_layers(two).values(), strict=True):
        assert torch.equal(first.index.columns, second.index.columns)
        assert torch.equal(first.values, second.values)


class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


def test_after_an_error_it_trains_again(base: Path, tmp_path: Path) -> None:
    model = attached(base, refresh_interval=2)
    trainer = sft(model, tmp_path)
    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.pop_callback(Stop)
    trainer.train()
    assert lift_state(model).refreshes == 1
    hooks = [layer.values._post_accumulate_grad_hooks for layer in lift_layers(model).values()]
    assert not any(hooks)


def off(model: LiftModel) -> None:
    model.base_model.disable_adapter_layers()


def frozen(model: LiftModel) -> None:
    model.set_adapter("default", inference_mode=True)


NOTHING = [(off, "is off, so nothing"), (frozen, "nothing of this model is trained")]


@pytest.mark.parametrize(("change", "match"), NOTHING, ids=["off", "frozen"])
@pytest.mark.parametrize("how", ["callback", "LiftTrainer", "loop"])
def test_a_model_of_which_nothing_is_trained(
    base: Path, tmp_path: Path, change: Any, match: str, how: str
) -> None:
    model = attached(base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    change(model)
    with pytest.raises(UserError, match=match):
        if how == "loop":
            Steps(model, optimizer)
        else:
            (sft if how == "callback" else ours)(model, tmp_path)
    assert not list(tmp_path.iterdir())


class Change(TrainerCallback):
    """Changes the model after the first step."""

    def __init__(self, change: Any) -> None:
        self.change = change

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **more: Any) -> None:
        if state.global_step == 1:
            self.change(model)


@pytest.mark.thorough
def test_values_that_the_optimizer_does_not_know_are_not_trained(
    base: Path, tmp_path: Path
) -> None:
    """It would go on with the first ones, which compute nothing."""
    smaller = attached(base, density=0.02)
    smaller.save_pretrained(tmp_path / "smaller")
    more = LiftConfig(approx_rank=8, selector="magnitude")
    for change in (lambda m: m.set_adapter("more"), lambda m: m.load_adapter(tmp_path / "smaller")):
        model = attached(base)
        model.add_adapter("more", more)
        callbacks = [LiftCallback(), Change(change)]
        with pytest.raises(UserError, match="than the optimizer was made for"):
            sft(model, tmp_path / "run", callbacks).train()
        with pytest.raises(UserError, match="than the optimizer was made for"):
            model = attached(base)
            model.add_adapter("more", more)
            ours(model, tmp_path / "run", callbacks=[Change(change)]).train()

    model = attached(base).train()
    model.add_adapter("more", more)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    steps = Steps(model, optimizer)
    model.set_adapter("more")
    model(IDS, labels=IDS).loss.backward()
    with pytest.raises(UserError, match="than the optimizer was made for"):
        steps.before()
    model.set_adapter("default")
    model(IDS, labels=IDS).loss.backward()
    assert steps.before()
    steps.close()


CANNOT: list[tuple[str, dict[str, Any], str]] = [
    ("grpo", {"cast_lm_head_to_fp32": True}, "leave out cast_lm_head_to_fp32"),
    ("sft", {"compiled": True}, "with torch_compile=True"),
]


@pytest.mark.parametrize(("method", "given", "match"), CANNOT)
def test_what_trl_cannot_do_is_one_sentence(
    base: Path, tmp_path: Path, method: str, given: dict[str, Any], match: str
) -> None:
    model: Any = attached(base)
    if given.pop("compiled", False):
        model = torch.compile(model, backend="eager")
    with pytest.raises(UserError, match=match):
        make(method, model, tmp_path, **PLAIN, **given)


def test_a_process_has_one_gpu(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Trainer would replicate the model in threads."""
    from transformers import TrainerControl, TrainerState, TrainingArguments

    args: Any = TrainingArguments(str(tmp_path), use_cpu=True)
    for cards, said in ((1, 0), (2, 1)):
        args._n_gpu = cards
        LiftCallback().on_init_end(args, TrainerState(), TrainerControl(), model=attached(base))
        assert args.n_gpu == 1
        assert sum("accelerate launch" in text for text in caplog.messages) == said


def test_vllm_would_generate_with_the_base(base: Path, tmp_path: Path) -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    args: Any = TrainingArguments(str(tmp_path), use_cpu=True)
    args.use_vllm = True
    with pytest.raises(UserError, match="generate with the base alone"):
        LiftCallback().on_init_end(args, TrainerState(), TrainerControl(), model=attached(base))
