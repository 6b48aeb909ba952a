"""Fitting a card: what is changed, in what order, and what a run that ran out is told."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from planned import arguments
from sweeps import swept, thorough
from tiny import make_checkpoint

from leanlift import LiftTrainer, UserError
from leanlift.cli import main
from leanlift.plan import Known, MemoryPlan
from leanlift.training import (
    LiftSFTConfig,
    RunArguments,
    plan_of,
)
from leanlift.training.changes import changes, densities, ordered_changes
from leanlift.training.fit import fit, parse_card, useful_changes
from leanlift.training.plan import least_of


@pytest.mark.thorough
def test_fit_takes_changes_in_order_until_it_fits(checkpoints: dict[str, Path]) -> None:
    args, sft = arguments(checkpoints["llama"], approx_rank=8, gradient_checkpointing=False)
    plan = plan_of(args, sft, cuda=False)
    assert fit(args, sft, plan.needed / 2**30, cuda=False).steps == ()
    said: list[str] = []
    found = fit(args, sft, 0.9 * plan.needed / 2**30, cuda=False, say=said.append)
    assert found.plan.fits(0.9 * plan.needed / 2**30)
    assert found.steps[0].startswith("optim=sparse_adamw_8bit, moments in 8 bits")
    assert said[1] == "trying the settings as they are"
    again = plan_of(found.args, found.sft, cuda=False)
    assert again.needed == found.plan.needed
    saved = sum(taken.saved for taken in found.taken)
    assert saved == plan.needed - found.plan.needed


def test_what_cannot_fit_is_refused_without_a_step(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leanlift.plan.planner.step_peak", None)  # whoever runs a step fails
    args, sft = arguments(checkpoints["llama"], approx_rank=8)
    with pytest.raises(
        UserError, match=r"does not fit 0.0001 GiB: the least setting needs .* while .* more than"
    ):
        fit(args, sft, 1e-4, cuda=False)


def test_a_change_that_a_model_cannot_have_is_left_out(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All others are made, and what was left out is said."""

    def needed(args: Any, sft: Any) -> int:
        if args.quantize_embeddings:
            raise UserError("these ends stay as they are.")
        saving = (args.embedding_on_cpu, args.stream_base, args.stream_state, args.density < 0.02)
        return (10 - sum(saving)) * 2**30

    def plan(args: Any, sft: Any, *rest: Any) -> MemoryPlan:
        return MemoryPlan("m", {}, {"train": needed(args, sft)}, {}, 1)

    monkeypatch.setattr("leanlift.training.fit.plan_of", plan)
    monkeypatch.setattr("leanlift.training.fit.least_of", lambda a, s, cuda: (needed(a, s), "load"))
    found = fit(*arguments(checkpoints["llama"], **LEAN, approx_rank=8), 8.6)
    assert found.args.stream_base
    assert not found.args.stream_state
    assert found.plan.notes == [
        "quantize_embeddings=true was left out: these ends stay as they are."
    ]
    with pytest.raises(UserError, match=r"setting \(without quantize_embeddings=true, which"):
        fit(*arguments(checkpoints["llama"], **LEAN, approx_rank=8), 5)


def test_what_one_plan_has_shown_hides_no_refusal_of_another(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step is the same with and without streamed state, which not every model can have."""

    def again(model: Any) -> None:
        raise UserError("it goes through a block again")

    monkeypatch.setattr("leanlift.plan.shapes.check_used_once", again)
    args, sft = arguments(checkpoints["llama"], **LEAN, approx_rank=8, max_length=8,
                          stream_base=True, optim_in_backward=True, max_grad_norm=0.0)  # fmt: skip
    known: Known = {}
    plan_of(args, sft, True, None, known)
    with pytest.raises(UserError, match="goes through a block again"):
        plan_of(dataclasses.replace(args, stream_state=True), sft, True, None, known)


LEAN: dict[str, Any] = {"optim": "sparse_adamw_8bit", "values_dtype": "bfloat16"}


def test_free_changes_come_first_and_a_smaller_batch_before_what_moves(
    checkpoints: dict[str, Path],
) -> None:
    args, sft = arguments(
        checkpoints["llama"], gradient_checkpointing=False, eval_strategy="steps", eval_steps=1
    )
    groups = list(ordered_changes(args, sft))
    assert [next(iter(choices[0].keys)) for choices in groups] == [
        "optim", "values_dtype", "per_device_eval_batch_size", "gradient_checkpointing",
        "tiled_mlp", "per_device_train_batch_size", "quantize_embeddings", "embedding_on_cpu",
        "activation_offloading", "stream_base", "optim_in_backward", "stream_state", "density",
    ]  # fmt: skip
    settings = args, sft
    for choices in groups:
        if choices[-1].possible(settings):
            settings = choices[-1](settings)
    args, sft = settings
    assert (args.density, sft.per_device_train_batch_size) == (0.01, 1)
    assert sft.gradient_accumulation_steps == 4
    assert args.stream_state
    assert sft.optim_in_backward
    assert sft.max_grad_norm == 0
    tied, sft = arguments(checkpoints["qwen2, tied"])
    assert all("embedding_on_cpu" not in choices[0].keys for choices in ordered_changes(tied, sft))
    on_a_cpu = list(ordered_changes(*arguments(checkpoints["llama"]), cuda=False))
    assert not {"embedding_on_cpu", "activation_offloading", "stream_base"} & {
        key for choices in on_a_cpu for key in choices[0].keys
    }


@pytest.mark.thorough
@pytest.mark.parametrize("batch", [4, 6, 8])
def test_a_smaller_micro_batch_leaves_the_step_as_it_is(
    checkpoints: dict[str, Path], batch: int
) -> None:
    args, sft = arguments(
        checkpoints["llama"], **LEAN, approx_rank=8, max_length=256,
        per_device_train_batch_size=batch, gradient_accumulation_steps=3,
    )  # fmt: skip
    plan = plan_of(args, sft, cuda=False)
    least = plan_of(args, dataclasses.replace(sft, per_device_train_batch_size=1), cuda=False)
    target = (plan.needed + least.needed) / 2
    found = fit(args, sft, target / 2**30, cuda=False)
    rows = found.sft.per_device_train_batch_size
    assert 1 < rows < batch, "the largest that fits, not the least"
    assert rows * found.sft.gradient_accumulation_steps == 3 * batch
    assert len(found.taken) == 1


@pytest.mark.thorough
@pytest.mark.parametrize(("first", "last"), [(4, 4), (2, 7)])
def test_the_density_that_is_chosen_is_the_largest_that_fits(
    checkpoints: dict[str, Path], first: int, last: int
) -> None:
    """Places in the list of densities, for which the card is as large as the plan needs."""
    args, sft = arguments(
        checkpoints["llama"], **LEAN, approx_rank=8, quantize_embeddings=True, density=0.5,
        per_device_train_batch_size=1, optim_in_backward=True, max_grad_norm=0.0,
    )  # fmt: skip
    needed = {
        density: plan_of(dataclasses.replace(args, density=density), sft, cuda=False).needed
        for density in densities(0.5)[first - 1 : last + 2]
    }
    assert list(needed.values()) == sorted(needed.values(), reverse=True)
    for target in list(needed.values())[1:-1:5]:
        found = fit(args, sft, (target + 10) / 2**30, cuda=False)
        fitting = [density for density, nbytes in needed.items() if nbytes <= target]
        assert found.args.density == max(fitting)


@pytest.mark.thorough
def test_changes_that_gain_nothing_are_skipped(checkpoints: dict[str, Path]) -> None:
    """The ends of this model are small, and its batch is one row."""
    args, sft = arguments(
        checkpoints["llama"], **LEAN, approx_rank=8, per_device_train_batch_size=1, density=0.5
    )
    plan = plan_of(args, sft, cuda=False)
    found = fit(args, sft, 0.8 * plan.needed / 2**30, cuda=False)
    assert all(taken.saved >= 0.01 * taken.before for taken in found.taken)
    assert [next(iter(taken.change.keys)) for taken in found.taken][-1] == "density"


@pytest.mark.thorough
def test_useful_changes_are_planned_one_by_one(checkpoints: dict[str, Path]) -> None:
    args, sft = arguments(checkpoints["llama"], **LEAN, approx_rank=8, max_length=256)
    plan = plan_of(args, sft, cuda=False)
    found = useful_changes(args, sft, plan, cuda=False)
    assert 0 < len(found) <= 3
    assert [taken.saved for taken in found] == sorted((t.saved for t in found), reverse=True)
    for taken in found:
        changed = plan_of(*taken.change((args, sft)), cuda=False)
        assert taken.saved == plan.needed - changed.needed


@pytest.mark.thorough
@pytest.mark.parametrize("name", swept(["llama", "gemma2", "qwen2, tied"], "llama"))
@pytest.mark.parametrize("lean", swept([False, True], True))
def test_no_plan_says_less_than_the_least(
    checkpoints: dict[str, Path], name: str, lean: bool
) -> None:
    more = LEAN if lean else {}
    args, sft = arguments(checkpoints[name], approx_rank=8, max_length=8, **more)
    for cuda in (False, True):
        least, _ = least_of(args, sft, cuda)
        assert 0.5 * least < least <= plan_of(args, sft, cuda).needed


@pytest.mark.parametrize("text", ["8GB", "8 GiB", "8", "8g", "8.0gb"])
def test_sizes_of_cards(text: str) -> None:
    assert parse_card(text) == 8


@pytest.mark.parametrize("text", ["", "big", "-1", "8TB", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="size of a card such as 8GB"):
        parse_card(text)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB. More."),
        thorough(
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."
            )
        ),
    ],
    ids=["cuda", "cpu"],
)
def test_running_out_of_memory_says_where_and_what_helps(
    error: RuntimeError,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1+1=", "completion": "2"}\n' * 8)
    stock = LiftTrainer.training_step

    def full(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            raise error
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(LiftTrainer, "training_step", full)
    argv = [
        "train", "--model_name_or_path", str(checkpoints["llama"]), "--dataset_name", str(rows),
        "--output_dir", str(tmp_path / "run"), "--approx_rank", "8", "--max_steps", "4",
        "--per_device_train_batch_size", "2", "--max_length", "32", "--save_steps", "1",
        "--gradient_checkpointing", "false",
    ]  # fmt: skip
    assert main(argv) == 3
    message = capsys.readouterr().err
    assert f"out of memory in phase train: {str(error).split('. ')[0].rstrip('.')}" in message
    assert "the plan had said" in message
    assert "The cheapest change that helps: gradient_checkpointing=true" in message
    assert "checkpoint-2" in message


@pytest.mark.thorough
def test_out_of_memory_names_what_would_fit_the_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_checkpoint(tmp_path / "base")  # two layers: checkpointing helps
    args = RunArguments(str(base), "rows.jsonl", approx_rank=8, values_dtype="bfloat16")
    sft = LiftSFTConfig(
        optim="sparse_adamw_8bit",
        output_dir="x",
        use_cpu=True,
        bf16=False,
        max_length=256,
        per_device_train_batch_size=8,
        gradient_checkpointing=False,
    )
    needed = plan_of(args, sft, cuda=False).needed
    what, changed = next(iter(changes(args, sft, cuda=False)))
    assert what.startswith("gradient_checkpointing=true")
    less = plan_of(*changed((args, sft)), cuda=False).needed
    assert less < needed
    run_module = importlib.import_module("leanlift.training.out_of_memory")
    monkeypatch.setattr(run_module, "card_nbytes", lambda cuda: less)
    said = run_module.what_helps(args, sft)
    assert said.startswith("The cheapest change that would fit ")
    assert said.count("less)") == 1
    assert "gradient_checkpointing=true" in said
    monkeypatch.setattr(run_module, "card_nbytes", lambda cuda: needed)
    said = run_module.what_helps(args, sft)
    assert said.startswith("The cheapest change that helps: gradient_checkpointing=true")
    monkeypatch.setattr(run_module, "card_nbytes", lambda cuda: 1000)
    assert "more than there is" in run_module.what_helps(args, sft)
