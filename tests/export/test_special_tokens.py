"""A merge has one tokenizer, and says everywhere which tokens were trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import load, make_checkpoint, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from leanlift import (
    LiftConfig,
    UserError,
    combine_adapters,
    export_peft,
    get_lift_model,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from leanlift.adapters.special import SpecialTokens
from leanlift.export.tokens import _vocabulary

STALE = {
    "special_tokens_map.json": {"eos_token": "q", "pad_token": "z", "unk_token": "<unk>"},
    "added_tokens.json": {"<gone>": 3},
    "chat_template.json": {"chat_template": "stale"},
    "vocab.json": {"stale": 0},
}
"""What checkpoints of other days have beside tokenizer.json."""


def write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data))


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def edit(path: Path, **changes: Any) -> None:
    write(path, {**(read(path) if path.is_file() else {}), **changes})


def make_base(path: Path, stale: bool, generation: dict[str, Any] | None) -> Path:
    base = make_checkpoint(path)
    edit(base / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    for name, data in STALE.items() if stale else ():
        write(base / name, data)
    (base / "generation_config.json").unlink()
    if generation is not None:
        write(base / "generation_config.json", generation)
    return base


def train(base: Path, adapter: Path, end: str | None, tokenizer: Any = None) -> Any:
    """As a trainer leaves it: the live model's configurations say what its tokenizer does."""
    model = get_lift_model(load(base, "nf4"), LiftConfig(approx_rank=8), progress=False)
    if end is not None:
        tokenizer = tokenizer or make_tokenizer()
        tokenizer.eos_token = end
        tokenizer.save_pretrained(adapter)
        model.config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, 1]
    save_adapter(model, adapter)
    return model


def merge(adapter: Path, output: Path, base: Path) -> Path:
    merge_adapter(adapter, output, base=base, progress=False)
    return output


def check_consistent(merged: Path, end: str, old_ends: set[int]) -> None:
    """Every reader of the merge sees one end token, which `generate` stops at."""
    tokenizer = AutoTokenizer.from_pretrained(merged)
    model = AutoModelForCausalLM.from_pretrained(merged)
    rows = model.get_input_embeddings().weight.shape[0]
    trained = tokenizer.convert_tokens_to_ids(end)
    assert tokenizer.eos_token == end
    assert tokenizer.eos_token_id == trained == model.config.eos_token_id
    assert read(merged / "config.json")["eos_token_id"] == trained
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    assert {trained} | old_ends == ends
    for token in (tokenizer.eos_token_id, tokenizer.pad_token_id, *ends):
        assert 0 <= token < rows
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


GENERATIONS: list[dict[str, Any] | None] = [
    None,
    {"eos_token_id": 1, "do_sample": False},
    {"eos_token_id": [1, 7]},
    {"do_sample": False},
]


@pytest.mark.parametrize("generation", GENERATIONS, ids=["none", "one", "several", "no-eos"])
@pytest.mark.parametrize("stale", [True, False], ids=["stale", "clean"])
@pytest.mark.parametrize("end", ["</s>", "!"], ids=["same-end", "new-end"])
def test_a_merge_says_one_thing(
    tmp_path: Path, stale: bool, end: str, generation: dict[str, Any] | None
) -> None:
    base = make_base(tmp_path / "base", stale, generation)
    train(base, tmp_path / "adapter", end)
    merged = merge(tmp_path / "adapter", tmp_path / "merged", base)
    check_consistent(merged, end, {1, 7} if generation == {"eos_token_id": [1, 7]} else {1})
    config = read(merged / "tokenizer_config.json")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "auto_map" not in config
    for name in STALE:
        assert (merged / name).exists() == (stale and name == "vocab.json")
    if generation is not None and "do_sample" in generation:
        assert read(merged / "generation_config.json")["do_sample"] is False


@pytest.mark.parametrize("stale", [True, False], ids=["stale", "clean"])
def test_without_a_tokenizer_in_the_adapter_the_bases_is_taken_whole(
    tmp_path: Path, stale: bool
) -> None:
    base = make_base(tmp_path / "base", stale, {"eos_token_id": [1, 7]})
    train(base, tmp_path / "adapter", None)
    merged = merge(tmp_path / "adapter", tmp_path / "merged", base)
    for file in base.iterdir():
        if "token" in file.name or file.name in STALE or "template" in file.name:
            assert (merged / file.name).read_bytes() == file.read_bytes(), file.name
    assert read(merged / "config.json")["eos_token_id"] == 1
    assert read(merged / "generation_config.json")["eos_token_id"] == [1, 7]


def test_what_the_trained_tokenizer_changed_leaves_nothing_of_the_base(tmp_path: Path) -> None:
    """Another vocabulary makes the base's vocabulary files stale too."""
    base = make_base(tmp_path / "base", True, None)
    tokenizer = make_tokenizer()
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = data["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    train(base, tmp_path / "adapter", "!")
    edit(tmp_path / "adapter" / "tokenizer.json", model=data["model"])
    merged = merge(tmp_path / "adapter", tmp_path / "merged", base)
    assert not any((merged / name).exists() for name in STALE)


def test_how_files_are_read_is_the_bases_affair(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", False, None)
    train(base, tmp_path / "adapter", "!")
    config = tmp_path / "adapter" / "tokenizer_config.json"
    edit(config, auto_map={"AutoTokenizer": ["evil/x--t.T", None]}, tokenizer_class="Evil",
         extra_special_tokens=["?"], is_local=True)  # fmt: skip
    for number, own in enumerate(
        ({"tokenizer_class": "GPT2Tokenizer", "auto_map": {"AutoTokenizer": ["own.T", None]}}, {})
    ):
        write(base / "tokenizer_config.json", own)
        merged = read(
            merge(tmp_path / "adapter", tmp_path / f"merged{number}", base)
            / "tokenizer_config.json"
        )
        assert merged["tokenizer_class"] == own.get("tokenizer_class", "PreTrainedTokenizerFast")
        assert merged.get("auto_map") == own.get("auto_map")
        assert merged["additional_special_tokens"] == ["?"]
        assert "extra_special_tokens" not in merged
        assert "is_local" not in merged


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", False, None)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<x1>", "<x2>"])
    train(base, tmp_path / "adapter", "!", tokenizer)
    with pytest.raises(UserError, match=r"ids up to \d+, but the base's embedding has \d+ rows"):
        merge(tmp_path / "adapter", tmp_path / "merged", base)
    assert not (tmp_path / "merged").exists()
    tokenizer.save_pretrained(base)  # one that came so: its own affair
    check_consistent(merge(tmp_path / "adapter", tmp_path / "merged", base), "!", {1})


def test_the_trained_end_comes_with_the_adapter_in_every_form(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", False, {"eos_token_id": [1, 7]})
    model = train(base, tmp_path / "adapter", "!")
    trained = model.config.eos_token_id
    (tmp_path / "adapter" / "tokenizer.json").unlink()
    export_peft(tmp_path / "adapter", tmp_path / "peft", progress=False)
    combine_adapters([tmp_path / "adapter"], tmp_path / "combined", progress=False)
    for form in ("adapter", "peft", "combined"):
        live = load_adapter(load(base, "nf4"), tmp_path / form)
        assert live.config.eos_token_id == trained
        assert live.generation_config.eos_token_id == [trained, 1, 7]
        merged = merge(tmp_path / form, tmp_path / f"merged-{form}", base)
        assert read(merged / "config.json")["eos_token_id"] == trained
        assert read(merged / "generation_config.json")["eos_token_id"] == [trained, 1, 7]
        save_adapter(live, tmp_path / f"again-{form}")
        assert SpecialTokens.of(live.config, live.generation_config).eos == (trained,)


BAD = [
    [],
    {},
    {"eos": [1], "bos": None, "pad": None},
    {"eos": 1, "bos": None, "pad": None, "stops": []},
    {"eos": [-1], "bos": None, "pad": None, "stops": []},
    {"eos": [True], "bos": None, "pad": None, "stops": []},
    {"eos": [2**40], "bos": None, "pad": None, "stops": []},
    {"eos": [], "bos": "1", "pad": None, "stops": []},
    {"eos": [], "bos": None, "pad": None, "stops": list(range(1000))},
]


@pytest.mark.parametrize("found", BAD, ids=lambda found: str(found)[:30])
def test_special_tokens_that_are_none_are_refused(tmp_path: Path, found: Any) -> None:
    base = make_base(tmp_path / "base", False, None)
    train(base, tmp_path / "adapter", None)
    edit(tmp_path / "adapter" / "adapter_config.json", special_tokens=found)
    with pytest.raises(UserError, match="expected ids of special tokens"):
        merge(tmp_path / "adapter", tmp_path / "merged", base)


def test_special_tokens_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", False, None)
    train(base, tmp_path / "adapter", None)
    tokens = {"eos": [1], "bos": None, "pad": 10**6, "stops": []}
    edit(tmp_path / "adapter" / "adapter_config.json", special_tokens=tokens)
    model = load(base, "nf4")
    with pytest.raises(UserError, match="special token 1000000, but the model's vocabulary"):
        load_adapter(model, tmp_path / "adapter")
    with pytest.raises(UserError, match="special token 1000000, but the base's embedding"):
        merge(tmp_path / "adapter", tmp_path / "merged", base)
    assert not (tmp_path / "merged").exists()


DAMAGED = [
    "[]",
    "null",
    "{",
    '{"added_tokens": [3, {"id": "x", "content": 4}], "model": []}',
    '{"model": {"vocab": {"a": -1, "b": 1e9}}}',
    '{"model": {"vocab": [["a"], 3, []]}}',
]


@pytest.mark.parametrize("text", DAMAGED, ids=str)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_tokenizers_end_in_a_sentence_and_strange_ones_do_no_harm(
    tmp_path: Path, name: str, text: str
) -> None:
    base = make_base(tmp_path / "base", False, None)
    train(base, tmp_path / "adapter", "!")
    (tmp_path / "adapter" / name).write_text(text)
    if text.startswith('{"'):
        merge(tmp_path / "adapter", tmp_path / "merged", base)
        return
    with pytest.raises(UserError, match=r"is damaged|is not valid JSON") as caught:
        merge(tmp_path / "adapter", tmp_path / "merged", base)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "merged").exists()


def test_links_out_of_a_base_are_not_followed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = make_base(tmp_path / "base", False, None)
    train(base, tmp_path / "adapter", None)
    (tmp_path / "secret").write_text("secret")
    (base / "notes.txt").symlink_to(tmp_path / "secret")
    (base / "real.txt").write_text("mine")
    (base / "again.txt").symlink_to(base / "real.txt")
    merged = merge(tmp_path / "adapter", tmp_path / "merged", base)
    assert not (merged / "notes.txt").exists()
    assert "Not copied into the merge" in caplog.text
    assert (merged / "again.txt").read_text() == "mine"
    assert not (merged / "again.txt").is_symlink()


@pytest.mark.parametrize(
    "damage",
    [
        {"added_tokens": 7},
        {"added_tokens": [None, 3, {"content": "x", "id": [1]}, {"content": "y", "id": "2"}]},
        {"model": {"vocab": {"a": [1], "b": None, "c": True, "d": -4, "e": 2.5, "f": 9}}},
        {"model": {"vocab": [["a", 0.1], "b", [], [3]]}},
        {"model": []},
    ],
)
def test_a_vocabulary_of_odd_values_is_read_past_them(tmp_path: Path, damage: Any) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(damage))
    for token, number in _vocabulary(tmp_path / "tokenizer.json"):
        assert isinstance(token, str)
        assert type(number) is int
        assert number >= 0
