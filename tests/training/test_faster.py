"""What is left on a card buys time: what is taken back, what is kept, and that it still fits."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from families import config_of
from tiny import make_checkpoint_of

from leanlift.cli import main
from leanlift.plan import MemoryPlan
from leanlift.plan.cards import card_named
from leanlift.training import LiftSFTConfig, RunArguments, plan_of
from leanlift.training.changes import Change, Taken, ordered_changes
from leanlift.training.faster import RESERVE, Faster, faster
from leanlift.training.fit import fit

CARD = card_named("RTX 3060")
GIB = 2**30


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    wide = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 320}
    config = config_of("llama", num_hidden_layers=12, **wide)
    return make_checkpoint_of(config, tmp_path_factory.mktemp("deep"))


def told(base: Path, **loop: Any) -> tuple[RunArguments, LiftSFTConfig]:
    args = RunArguments(str(base), "rows.json", approx_rank=8, values_dtype="bfloat16")
    given = {
        "optim": "sparse_adamw_8bit", "max_length": 256, "per_device_train_batch_size": 4,
        "use_cpu": True, "bf16": False, **loop,
    }  # fmt: skip
    return args, LiftSFTConfig(output_dir="x", **given)


def needed(settings: tuple[RunArguments, LiftSFTConfig], **loop: Any) -> int:
    return plan_of(settings[0], replace(settings[1], **loop), cuda=True).needed


def test_as_many_blocks_as_fit_are_kept(deep: Path) -> None:
    settings = told(deep)
    room = needed(settings, kept_blocks=5) + 1000
    gib = room / GIB / (1 - RESERVE)
    tried: list[str] = []
    found = fit(*settings, gib, True, tried.append, card=CARD)
    assert found.taken == ()
    keys = [each.change.keys for each in found.bought]
    assert keys == [{"reuse_weights": True}, {"kept_blocks": 5}]
    both = {"kept_blocks": 5, "reuse_weights": True}
    assert found.plan.needed == needed(settings, **both) <= room
    assert needed(settings, kept_blocks=6) > room
    assert sum(each.taken for each in found.bought) == found.plan.needed - needed(settings)
    assert all(each.saved > 0 for each in found.bought)
    tries = sum("kept_blocks" in line for line in tried)
    assert tries <= 6, "all, before and with weights reused, and half; a line, and the proof"
    assert fit(*settings, gib, True).bought == (), "no card, no times"
    asked = fit(*settings, gib, True, card=CARD, asked={"kept_blocks", "reuse_weights"})
    assert asked.bought == (), "what the user has set stays"
    tight = fit(*settings, needed(settings) * 1.01 / GIB, True, card=CARD)
    assert (tight.taken, tight.bought) == ((), ()), "the reserve is not spent"


def test_kept_blocks_are_given_up_to_fit(deep: Path) -> None:
    groups = [choices[0].keys for choices in ordered_changes(*told(deep, kept_blocks=3))]
    assert {"kept_blocks": 0} in groups
    assert {"kept_blocks": 0} not in [c[0].keys for c in ordered_changes(*told(deep))]
    settings = told(deep, kept_blocks=3)
    room = needed(settings, kept_blocks=0) + 1000
    found = fit(*settings, room / GIB, True)
    assert [step.change.keys for step in found.taken] == [{"kept_blocks": 0}]


@pytest.mark.thorough
def test_all_are_kept_where_there_is_room_and_none_where_nothing_is_recomputed(deep: Path) -> None:
    found = fit(*told(deep), 8, True, card=CARD)
    assert found.sft.kept_blocks == 12
    assert fit(*told(deep, gradient_checkpointing=False), 8, True, card=CARD).bought == ()


@pytest.mark.thorough
def test_packed_rows_come_in_larger_pieces(deep: Path) -> None:
    loop = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6, "max_length": 64}
    packed = fit(*told(deep, packing=True, **loop), 8, True, card=CARD)
    rows, times = (
        packed.sft.per_device_train_batch_size, packed.sft.gradient_accumulation_steps,
    )  # fmt: skip
    assert rows > 1
    assert rows * times == 6
    padded = fit(*told(deep, **{**loop, "max_length": 4096}), 40, True, card=CARD)
    assert padded.sft.per_device_train_batch_size == 1, "longer rows of a batch pad the others"
    asked = {"gradient_accumulation_steps"}
    kept = fit(*told(deep, packing=True, **loop), 8, True, card=CARD, asked=asked)
    assert kept.sft.per_device_train_batch_size == 1


def test_mlps_take_long_rows_in_larger_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leanlift.layers.tiled_mlp.LEAST", 64)
    monkeypatch.setattr("leanlift.layers.tiled_mlp.MOST", 128)
    config = config_of("llama", num_hidden_layers=3, intermediate_size=1024)
    args, sft = told(make_checkpoint_of(config, tmp_path))
    tiled = replace(args, tiled_mlp=True), sft
    asked = {"kept_blocks", "reuse_weights"}
    found = fit(*tiled, 8, True, card=CARD, asked=asked)
    assert [each.change.keys["mlp_tokens"] for each in found.bought] == [256, 512], "of 1024: 4, 2"
    assert found.args.mlp_tokens == 512
    times = [found.bought[0].slower, *(each.faster for each in found.bought)]
    assert [a.seconds > b.seconds for a, b in pairwise(times)] == [True, True]
    assert fit(*tiled, 8, True, card=CARD, asked={*asked, "mlp_tokens"}).bought == ()
    assert fit(args, sft, 8, True, card=CARD, asked=asked).bought == (), "no MLP goes in pieces"
    room = plan_of(replace(args, tiled_mlp=True, mlp_tokens=256), sft, cuda=True).needed + 1000
    tight = fit(*tiled, room / GIB / (1 - RESERVE), True, card=CARD, asked=asked)
    assert (tight.args.mlp_tokens, tight.plan.needed <= room) == (256, True)


def test_larger_pieces_are_given_up_to_fit(deep: Path) -> None:
    args, sft = told(deep)
    large = replace(args, tiled_mlp=True, mlp_tokens=4096)
    groups = [choices[0].keys for choices in ordered_changes(large, sft)]
    assert {"mlp_tokens": 2048} in groups
    small = replace(large, mlp_tokens=1024)
    assert all("mlp_tokens" not in choices[0].keys for choices in ordered_changes(small, sft))


def bought_after(deep: Path, taken: list[dict[str, Any]], room: float) -> Faster:
    """After these changes, on a card that has `room` times what they need."""
    start = told(deep)
    steps, settings = [], start
    for keys in taken:
        change = Change(keys, "")
        before = plan_of(*settings, cuda=True).needed
        settings = change(settings)
        steps.append(Taken(change, before, plan_of(*settings, cuda=True).needed))
    plan = plan_of(*settings, cuda=True)

    def made(tried: tuple[RunArguments, LiftSFTConfig], what: str) -> MemoryPlan:
        return plan_of(*tried, cuda=True)

    return faster(start, tuple(steps), plan, room * plan.needed / GIB, CARD, made, ("kept_blocks",))


@pytest.mark.thorough
def test_what_a_later_change_made_needless_is_taken_back(deep: Path) -> None:
    taken = [
        {"quantize_embeddings": True}, {"activation_offloading": True}, {"stream_base": True},
    ]  # fmt: skip
    roomy = bought_after(deep, taken, 1.3)
    assert not roomy.settings[0].quantize_embeddings, "what costs quality goes first"
    assert roomy.settings[0].stream_base, "without the last change it did not fit"
    tight = bought_after(deep, taken, 1.0)
    assert len(tight.taken) >= len(roomy.taken)
    assert tight.plan.needed <= plan_of(*tight.settings, cuda=True).needed


def test_the_command_says_what_was_bought_and_how_long_a_step_takes(
    deep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["plan", "--model_name_or_path", str(deep), "--max_length", "64", "--approx_rank", "8"]
    place = tmp_path / "run.yaml"
    assert main([*argv, "--fit", "8GB", "--save", str(place)]) == 0
    text = capsys.readouterr().out
    assert "Of what was left, time was bought back:" in text
    assert "kept_blocks=12" in text
    assert "modelled from the card's data sheet" in " ".join(text.split())
    assert "on RTX 3060" in " ".join(text.split())
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "kept_blocks: 12" in place.read_text()
    assert main([*argv, "--json", "--card", "rtx4090"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["time"]["card"] == "RTX 4090"
    assert plan["time"]["seconds"] == pytest.approx(sum(plan["time"]["parts"].values()))
    assert plan["bought"] == []
    assert main([*argv, "--card", "abacus"]) == 2
    assert "expected card as one of" in capsys.readouterr().err
    assert main([*argv, "--json", "--card", "rtx4090", "--cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["time"] is None
