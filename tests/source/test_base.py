"""A base on disk says of itself what a live one does."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, config_of
from huggingface_hub import constants
from peft import ShiraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from seeing import make_seeing
from sweeps import swept
from tiny import load, make_checkpoint, make_checkpoint_of
from torch import nn

from leanlift import LiftConfig, UserError, get_lift_model, load_adapter, save_adapter
from leanlift.adapters import open_adapter
from leanlift.source import stored_base

TEXT = "AutoModelForCausalLM"


def stored_wider(path: Path) -> Path:
    """fp32 numbers, which its configuration has loaded in bf16."""
    file = make_checkpoint(path) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "dtype": "bfloat16"}))
    return path


def stored_by_the_head(path: Path) -> Path:
    """A tied embedding, under the name of the head alone."""
    file = make_checkpoint(path) / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, {"format": "pt"})
    return path


BASES: dict[str, tuple[Callable[[Path], Path], str]] = {
    name: (partial(make_checkpoint_of, config_of(name)), TEXT)
    for name in FAMILIES
    if "turned" not in name  # PEFT has it over no Conv1D
}
BASES |= {
    "untied, shards": (partial(make_checkpoint, tied=False, max_shard_size="100KB"), TEXT),
    "wider": (stored_wider, TEXT),
    "by the head": (stored_by_the_head, TEXT),
    "bf16, biased": (partial(make_checkpoint, biased=True, dtype=torch.bfloat16), TEXT),
    "llava": (partial(make_seeing, kind="llava"), "AutoModelForImageTextToText"),
    "gemma3, seeing": (partial(make_seeing, kind="gemma3"), "AutoModelForImageTextToText"),
    "gemma3, its text": (partial(make_seeing, kind="gemma3"), TEXT),
    "qwen3.5": (partial(make_seeing, kind="qwen3_5"), "AutoModelForImageTextToText"),
    "qwen3.5, its text": (partial(make_seeing, kind="qwen3_5"), TEXT),
}
CHEAP = ("phi3, fused", "wider", "by the head", "gemma3, seeing")


def trained_by_peft(model: Any, directory: Path) -> None:
    """SHiRA on the Linears of the text part's blocks."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name and "vision" not in name
    ]
    get_peft_model(model, ShiraConfig(r=1, target_modules=names)).save_pretrained(directory)


@pytest.mark.parametrize("case", swept(BASES, *CHEAP))
def test_a_base_on_disk_says_what_a_live_one_does(tmp_path: Path, case: str) -> None:
    make, kind = BASES[case]
    make(tmp_path / "base")
    auto = getattr(transformers, kind)
    trained_by_peft(auto.from_pretrained(tmp_path / "base"), tmp_path / "peft")
    with open_adapter(tmp_path / "peft") as adapter:
        stored = adapter.base
    live = load_adapter(auto.from_pretrained(tmp_path / "base"), tmp_path / "peft")
    save_adapter(live, tmp_path / "own")
    with open_adapter(tmp_path / "own") as adapter:
        ours, theirs = stored.to_dict(), adapter.base.to_dict()
    if case == "wider":  # files have more digits than the model; the digest is of what it has
        ours["samples"], theirs["samples"] = set(ours["samples"]), set(theirs["samples"])
    assert ours == theirs


@pytest.mark.parametrize("kind", swept(["nf4+double", "int8"], "nf4+double"))
def test_so_does_one_that_is_quantized_on_disk(base: Path, tmp_path: Path, kind: str) -> None:
    load(base, kind).save_pretrained(tmp_path / "base")
    config = LiftConfig(target_modules=("q_proj", "down_proj"), selector="magnitude")
    live = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    save_adapter(get_lift_model(live, config, progress=False), tmp_path / "own")
    with open_adapter(tmp_path / "own") as adapter:
        known = adapter.base
    found = stored_base(tmp_path / "base", known.name, list(known.shapes))
    assert (found.digest, found.sampled, found.dtype) == (known.digest, known.sampled, known.dtype)
    assert (found.shapes, found.formats) == (known.shapes, known.formats)
    assert {n: found.samples[n] for n in known.sampled} == {
        n: known.samples[n] for n in known.sampled
    }


def test_a_name_on_the_hub_is_its_snapshot_with_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--someone--model"
    make_checkpoint(place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    trained_by_peft(load(place / "snapshots" / commit, "dense"), tmp_path / "peft")
    config = tmp_path / "peft" / "adapter_config.json"
    data = json.loads(config.read_text())
    config.write_text(json.dumps({**data, "base_model_name_or_path": "someone/model"}))
    with open_adapter(tmp_path / "peft") as adapter:
        assert (adapter.base.name, adapter.base.revision) == ("someone/model", commit)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "none such"}, "cannot be known as a base without loading it"),
        ({"model_type": "vit"}, "no language model of the kind vit"),
        ({"hidden_size": "wide"}, "cannot be known as a base"),
        ({"num_hidden_layers": 3}, "has no tensor model.layers.2"),
    ],
)
def test_a_configuration_that_makes_no_such_model_is_refused(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    base = make_checkpoint(tmp_path / "base")
    data = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**data, **change}))
    with pytest.raises(UserError, match=words):
        stored_base(base, "base", ["model.layers.0.self_attn.q_proj"])
