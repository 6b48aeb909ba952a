"""What can be known early is said early: in one sentence, before weights are read or written."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import load, make_tokenizer
from torch.utils import checkpoint
from transformers import OPTConfig, OPTForCausalLM

from leanlift import (
    LiftConfig,
    LiftTrainer,
    UserError,
    get_lift_model,
    save_adapter,
)
from leanlift.cli import main
from leanlift.cli.settings import parse_train
from leanlift.errors import first_line
from leanlift.evaluation.evaluate import evaluate
from leanlift.io.tensors import new_directory
from leanlift.training import LiftSFTConfig, plan_memory
from leanlift.training.checks import check_settings
from leanlift.training.memory import timeline

ROWS = [{"prompt": "1 + 1 = ", "completion": "2"}] * 4


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("early") / "adapter"
    model = get_lift_model(
        load(base, "dense"), LiftConfig(approx_rank=2, target_modules=("q_proj",)), progress=False
    )
    save_adapter(model, place)
    return place


def train(base: Path, out: Path, *more: str) -> int:
    rows = out.with_suffix(".json")
    rows.write_text(json.dumps(ROWS), encoding="utf-8")
    given = ["--model_name_or_path", base, "--dataset_name", rows, "--output_dir", out]
    return main(["train", *map(str, given), "--load_in_4bit", "false", "--max_steps", "1", *more])


# --- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "num_cycles"),
        ({"lr_scheduler_kwargs": "abc"}, "mapping"),
        ({"load_best_model_at_end": True, "save_strategy": "no"}, "needs evaluations"),
        ({"output_dir": ""}, "output_dir is an empty text"),
    ],
    ids=str,
)
def test_settings_that_no_trainer_could_keep(
    settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    given = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, **settings}
    with pytest.raises(UserError, match=said):
        check_settings(LiftSFTConfig(**given), LiftConfig())


@pytest.mark.parametrize(
    ("name", "options"),
    [("cosine_with_min_lr", {"min_lr": 1e-5}), ("cosine_with_restarts", {"num_cycles": 2})],
)
def test_schedules_with_their_settings_are_taken(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    sft = LiftSFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        lr_scheduler_type=name,
        lr_scheduler_kwargs=options,
    )
    check_settings(sft, LiftConfig())


def test_small_numbers_are_numbers_inside_a_setting_too(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model_name_or_path: m\ndataset_name: d.json\nuse_cpu: true\nlearning_rate: 1e-3\n"
        "lr_scheduler_kwargs: {min_lr: 1e-5, other: 1E-2, name: e-5}\n",
        encoding="utf-8",
    )
    _, sft = parse_train(["--config", str(path)])
    assert sft.learning_rate == 1e-3
    assert sft.lr_scheduler_kwargs == {"min_lr": 1e-5, "other": 1e-2, "name": "e-5"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--target_modules", "q_proj", "q_porj"], "target_modules=['q_porj'] matches nothing"),
        (["--density_pattern", '{"q_porj": 0.1}'], "density_pattern 'q_porj' matches none"),
        (["--block", "3"], "blocks of 3x3 do not divide"),
        (["--density", "1e-9"], "selects 0 entries"),
        (["--merged_dir", "{out}"], "is, or holds, output_dir"),
        (["--merged_dir", "{out}/.."], "is, or holds, output_dir"),
        (["--eval_strategy", "steps"], "name rows with eval_dataset_name"),
    ],
    ids=str,
)
def test_nothing_is_loaded_for_a_run_that_cannot_be(
    options: list[str],
    said: str,
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = sys.modules["leanlift.training.run"]  # the package has a function of that name
    monkeypatch.setattr(module, "load_model", lambda *args: pytest.fail("loaded"))
    out = tmp_path / "out"
    assert train(base, out, *(text.replace("{out}", str(out)) for text in options)) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    "config",
    [{"target_modules": ("q_proj", "nope")}, {"density_pattern": {"nope": 0.1}}],
    ids=["target", "pattern"],
)
def test_what_matches_nothing_is_refused_in_python_too(base: Path, config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="nope"):
        get_lift_model(load(base, "dense"), LiftConfig(approx_rank=2, **config), progress=False)


# --- places -----------------------------------------------------------------------------------


def test_an_adapter_is_not_put_beside_a_model(base: Path, tmp_path: Path) -> None:
    """Stock transformers would take the base for an adapter of PEFT's from then on."""
    place = tmp_path / "base"
    shutil.copytree(base, place)
    before = sorted(os.listdir(place))
    model = get_lift_model(load(base, "dense"), LiftConfig(approx_rank=2), progress=False)
    file = tmp_path / "file"
    file.touch()
    for bad in (place, file):
        with pytest.raises(UserError, match="choose another"):
            save_adapter(model, bad)
        sft = LiftSFTConfig(output_dir=str(bad), use_cpu=True, bf16=False)
        with pytest.raises(UserError, match="choose another"):
            LiftTrainer(
                model=model, args=sft, train_dataset=ROWS, processing_class=make_tokenizer()
            )
    assert sorted(os.listdir(place)) == before


def test_of_two_who_write_one_directory_one_is_told(tmp_path: Path) -> None:
    place = tmp_path / "merged"
    with pytest.raises(UserError, match="another process has written"), new_directory(place):
        place.mkdir()
        (place / "theirs").touch()
    assert os.listdir(tmp_path) == ["merged"]
    assert os.listdir(place) == ["theirs"]


# --- configurations of a base -----------------------------------------------------------------

CONFIGS: dict[str, dict[str, Any]] = {
    "a text for a number": {"hidden_size": "x"},
    "sizes that do not fit": {"hidden_size": 65},
    "no size": {"num_hidden_layers": None},
    "an unknown activation": {"hidden_act": "nope"},
    "an unknown dtype": {"dtype": "nope"},
    "no quantization": {"quantization_config": 5},
    "unknown positions": {"rope_parameters": {"rope_type": "linear"}},
    "no model": {"model_type": "nope"},
}


def edited(base: Path, place: Path, config: dict[str, Any]) -> Path:
    shutil.copytree(base, place)
    path = place / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}), encoding="utf-8")
    return place


@pytest.mark.parametrize("name", CONFIGS)
def test_no_plan_of_a_damaged_configuration(name: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        plan_memory(edited(base, tmp_path / "base", CONFIGS[name]))


def fewer(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def more(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(2, 2)


def smaller(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(2, 2)


TENSORS: dict[str, Callable[[dict[str, torch.Tensor]], None]] = {
    "one is missing": fewer,
    "one is left over": more,
    "one has another shape": smaller,
}
UNREADABLE = {**CONFIGS, "more blocks": {"num_hidden_layers": 3}, "fewer": {"num_hidden_layers": 1}}


@pytest.mark.parametrize("name", [*UNREADABLE, *TENSORS])
def test_no_merge_that_nothing_could_load(
    name: str, base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The matrices that the adapter trains are those of its base; all else may not be."""
    other = edited(base, tmp_path / "base", UNREADABLE.get(name, {}))
    if name in TENSORS:
        tensors = load_file(other / "model.safetensors")
        TENSORS[name](tensors)
        save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    merged = tmp_path / "merged"
    assert main(["export", str(adapter), str(merged), "--base", str(other)]) == 2
    assert "leanlift: " in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["base"]


def test_a_missing_key_is_a_sentence() -> None:
    assert first_line(KeyError("nope")) == "there is no 'nope'."
    assert first_line(KeyError("a whole sentence")) == "a whole sentence."


# --- positions --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that looks its 16 positions up."""
    place, tokenizer = tmp_path_factory.mktemp("early") / "opt", make_tokenizer()
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    OPTForCausalLM(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def trainer_of(base: Path, out: Path, length: int, **more: Any) -> LiftTrainer:
    model = get_lift_model(load(base, "dense"), LiftConfig(approx_rank=2), progress=False)
    given = {"output_dir": str(out), "use_cpu": True, "bf16": False, "save_strategy": "no", **more}
    return LiftTrainer(
        model=model,
        args=LiftSFTConfig(max_steps=1, disable_tqdm=True, **given),
        train_dataset=[{"prompt": "a", "completion": "b" * (length - 2)}] * 2,
        processing_class=make_tokenizer(),
    )


def test_no_row_is_longer_than_a_table_of_positions(opt: Path, tmp_path: Path) -> None:
    trainer_of(opt, tmp_path, 16).train()
    trainer_of(opt, tmp_path, 40, max_length=16).train()
    with pytest.raises(UserError, match="has 17 tokens, and the base has a table of 16 positions"):
        trainer_of(opt, tmp_path, 17)


def test_no_answer_is_longer_than_a_table_of_positions(opt: Path) -> None:
    model, tokenizer = load(opt, "dense"), make_tokenizer()
    rows = [{"prompt": "12345678", "completion": "9"}]
    evaluate(model, tokenizer, rows, max_new_tokens=8, progress=False)
    for new, row in ((9, rows[0]), (0, {"prompt": "1", "completion": "2" * 15})):
        with pytest.raises(UserError, match="17 tokens, and the base has a table of 16 positions"):
            evaluate(model, tokenizer, [row], max_new_tokens=new, progress=False)


def test_longer_than_the_base_was_made_for_is_said(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer_of(base, tmp_path, 256)
    assert "was made for" not in caplog.text
    trainer_of(base, tmp_path, 257)
    assert "has 257 tokens, and the base was made for 256 positions" in caplog.text


def test_a_memory_timeline_goes_without_the_early_stop_of_recomputation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its exception does not survive the stacks that the history takes on CUDA."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda *a, **k: None)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).touch())
    default = checkpoint._enable_checkpoint_early_stop
    with timeline(True, tmp_path):
        assert checkpoint._enable_checkpoint_early_stop is False
    assert checkpoint._enable_checkpoint_early_stop is default
    assert (tmp_path / "memory_snapshot.pickle").exists()


def test_a_run_that_card_or_disk_cannot_hold_is_refused_before_its_base_is_loaded(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"instruction": "1 + 1", "output": "2"}] * 4))
    command = ["train", "--model_name_or_path", str(base), "--dataset_name", str(rows)]
    command += ["--output_dir", str(tmp_path / "out"), "--approx_rank", "8", "--max_steps", "1"]
    module = import_module("leanlift.training.run")
    monkeypatch.setattr(module, "load_model", lambda *a: pytest.fail("was loaded"))
    monkeypatch.setattr("leanlift.training.job.card_nbytes", lambda cuda: 2**10)
    assert main(command) == 2
    assert "planned to need" in capsys.readouterr().err
    monkeypatch.setattr("leanlift.training.job.card_nbytes", lambda cuda: None)
    nothing = SimpleNamespace(free=0)
    monkeypatch.setattr("leanlift.export.directory.shutil.disk_usage", lambda place: nothing)
    assert main(command) == 2
    assert "but only" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
