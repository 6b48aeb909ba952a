"""What was named is named: each command, given each kind of place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import complaint
from tiny import load, make_checkpoint
from transformers import AutoModelForCausalLM

from leanlift import LiftConfig, export_peft, get_lift_model, load_adapter, save_adapter
from leanlift.cli import main
from leanlift.io.places import look_at

LORA = {"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen3-8B", "r": 8}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each kind, by name."""
    work = tmp_path_factory.mktemp("places")
    model = load(make_checkpoint(work / "model", dtype=torch.float16))
    save_adapter(
        get_lift_model(model, LiftConfig(density=0.1, approx_rank=4), progress=False),
        work / "adapter",
    )
    export_peft(work / "adapter", work / "shira", progress=False)
    for name in ("lora", "gguf", "empty", "other", "cut", "broken"):
        (work / name).mkdir()
    (work / "lora" / "adapter_config.json").write_text(json.dumps(LORA))
    (work / "broken" / "adapter_config.json").write_text("{")
    (work / "gguf" / "model-Q4.gguf").write_bytes(b"GGUF" + bytes(20))
    (work / "other" / "notes.txt").touch()
    (work / "cut" / "checkpoint-30").mkdir()
    (work / "cut" / "checkpoint-200").mkdir()
    (work / "file.gguf").write_bytes(b"GGUF" + bytes(20))
    (work / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    return work


KINDS = {
    "model": ("model", "a model's checkpoint"),
    "adapter": ("adapter", "a leanlift adapter"),
    "shira": ("adapter", "a SHiRA adapter"),
    "lora": ("foreign adapter", "of type LORA"),
    "broken": ("foreign adapter", "cannot be read"),
    "gguf": ("gguf", "GGUF"),
    "file.gguf": ("gguf", "GGUF"),
    "rows.jsonl": ("file", "a file"),
    "empty": ("empty", "an empty directory"),
    "other": ("directory", "neither a model nor an adapter"),
    "cut": ("run", "checkpoint-200"),
    "none": ("none", "no such directory"),
}


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_place_has_its_words(places: Path, name: str) -> None:
    kind, words = KINDS[name]
    found = look_at(places / name)
    assert found.kind == kind
    assert words in found.words


def test_what_a_stranger_says_of_himself_is_shown_in_short_or_not_at_all(tmp_path: Path) -> None:
    for lie in ("x" * 1000, "\x1b[2J", ["LORA"], None, 7):
        data = {"peft_type": lie, "base_model_name_or_path": lie}
        (tmp_path / "adapter_config.json").write_text(json.dumps(data))
        found = look_at(tmp_path)
        assert found.kind == "foreign adapter"
        assert found.words.isprintable()
        assert len(found.words) < 100
        assert found.base is None


NO_ADAPTER = ("model", "lora", "broken", "gguf", "file.gguf", "rows.jsonl", "empty", "other", "cut")
NO_BASE = ("adapter", "shira", "lora", "broken", "gguf", "file.gguf", "rows.jsonl", "empty", "cut")


@pytest.mark.parametrize("name", NO_ADAPTER)
def test_what_is_no_adapter_is_named(
    places: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place, data = str(places / name), str(places / "rows.jsonl")
    for argv in (
        ["info", place],
        ["eval", "--adapter", place, "--data", data],
        ["export", place, str(places / "out")],
    ):
        said = complaint(capsys, *argv)
        assert name in said
        assert KINDS[name][1] in said or "LORA" in said or "not valid JSON" in said, said
        assert not (places / "out").exists()


@pytest.mark.parametrize("name", NO_BASE)
def test_what_is_no_base_is_named(
    places: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place, data = str(places / name), str(places / "rows.jsonl")
    argv = ["eval", "--model_name_or_path", place, "--data", data]
    said = complaint(capsys, *argv)
    assert f"the base {place} has no config.json: it is " in said
    assert KINDS[name][1] in said
    if name == "lora":
        assert "Qwen/Qwen3-8B" in said
    if name == "adapter":
        assert str(places / "model") in said


def test_a_reader_of_pefts_is_told_what_to_call(places: Path) -> None:
    from peft import PeftModel

    adapter = str(places / "adapter")
    with pytest.raises(KeyError, match=r"load it with leanlift\.load_adapter.*leanlift export"):
        AutoModelForCausalLM.from_pretrained(adapter)
    with pytest.raises(KeyError, match=r"leanlift\.load_adapter"):
        PeftModel.from_pretrained(load(places / "model", "dense"), adapter)


def test_an_adapter_with_the_shorter_type_is_read(places: Path, tmp_path: Path) -> None:
    """What was written before peft_type said what to call."""
    for file in (places / "adapter").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["peft_type"] = "LEANLIFT"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    load_adapter(load(places / "model"), tmp_path)
    assert main(["info", str(tmp_path)]) == 0
