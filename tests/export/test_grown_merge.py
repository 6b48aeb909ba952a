"""A model with new rows is the same when it is loaded again and when it is merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from grown import (
    CHATS,
    ENDS,
    HAVE,
    ROWS,
    grown,
    logits,
    make_any,
    make_biased,
    make_tokens,
)
from safetensors.torch import load_file, save_file
from sweeps import swept
from tiny import load
from transformers import AutoModelForCausalLM, AutoTokenizer

from leanlift import (
    LiftConfig,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from leanlift.adapters import open_adapter
from leanlift.evaluation.verify import verify_merged
from leanlift.export.rows import put_vocabulary, with_new_rows
from leanlift.model import embedding_to_cpu, lift_state, restore_adapter
from leanlift.source import SourceTensor, open_checkpoint, plain_view
from leanlift.weights.quantized import dtype_of


@pytest.mark.parametrize("quantized", [False, True], ids=["plain-ends", "int8-ends"])
@pytest.mark.parametrize("kind", swept(["nf4+double", "int8", "dense"], "nf4+double"))
@pytest.mark.parametrize("ends", ENDS)
def test_a_reloaded_and_a_merged_model_are_the_trained_one(
    tmp_path: Path, ends: str, kind: str, quantized: bool
) -> None:
    path = make_any(tmp_path / "base", ends)
    lift = LiftConfig(approx_rank=4, refresh_interval=0, quantize_embeddings=quantized)
    model = grown(load(path, kind), lift)
    expected = logits(model)
    assert expected.shape[-1] == ROWS == model.config.vocab_size
    assert lift_state(model).embedding_rows == ROWS
    save_adapter(model, tmp_path / "adapter")
    make_tokens().save_pretrained(tmp_path / "adapter")
    again = load_adapter(load(path, kind), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), expected)
    assert lift_state(again).embedding_rows == again.config.vocab_size == ROWS

    report = merge_adapter(
        tmp_path / "adapter", tmp_path / "merged", dtype="float32", onto="quantized", progress=False
    )
    stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert stock.config.vocab_size == ROWS >= len(tokenizer)
    torch.testing.assert_close(logits(stock), expected, atol=2e-5, rtol=1e-5)
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert ("lm_head.weight" in tensors) == (ends != "tied")
    assert report.tensors == len(tensors)
    if not quantized:
        embedding = model.get_input_embeddings().weight
        assert torch.equal(embedding, stock.get_input_embeddings().weight)
        assert torch.equal(model.get_output_embeddings().weight, stock.lm_head.weight)
        assert (model.get_output_embeddings().weight is embedding) == (ends == "tied")
    rendered = tokenizer.apply_chat_template(CHATS[0]["messages"], return_dict=False)
    assert HAVE <= max(rendered) < ROWS


@pytest.mark.parametrize("loaded", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("stored", ["bfloat16", "float32", "float16"])
def test_dtypes_of_file_and_model_may_differ(tmp_path: Path, stored: str, loaded: str) -> None:
    path = make_any(tmp_path / "base", "untied", dtype_of(stored))
    model = grown(load(path, "dense", dtype_of(loaded)))
    save_adapter(model, tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype="float32", progress=False)
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    original = load_file(path / "model.safetensors")
    ends = {"model.embed_tokens": model.get_input_embeddings(), "lm_head": model.lm_head}
    for name, module in ends.items():
        merged = tensors[f"{name}.weight"]
        assert torch.equal(merged[HAVE:], module.weight[HAVE:].float())
        assert torch.equal(merged[:HAVE], original[f"{name}.weight"].float())


def test_rows_of_a_merge_are_read_from_anywhere(tmp_path: Path) -> None:
    save_adapter(grown(load(make_biased(tmp_path / "base"), "dense")), tmp_path / "adapter")
    with open_adapter(tmp_path / "adapter") as adapter, open_checkpoint(tmp_path / "base") as files:
        tensors = with_new_rows(adapter, plain_view(files))
        for name in ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"):
            tensor = tensors[name]
            assert isinstance(tensor, SourceTensor)
            whole = tensor.whole()
            assert whole.shape == tensor.shape
            assert torch.equal(whole[:HAVE], files[name].whole())
            places = (0, 1, HAVE - 1, HAVE, HAVE + 1, ROWS)
            for start, stop in [(a, b) for a in places for b in places if a < b]:
                assert torch.equal(tensor.rows(start, stop), whole[start:stop])


def test_shards_and_a_head_that_is_stored_though_it_is_tied(base: Path, tmp_path: Path) -> None:
    path = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    model = grown(load(path, "dense"))
    save_adapter(model, tmp_path / "adapter")
    options: dict[str, Any] = {"dtype": "float32", "max_shard_size": 20_000, "progress": False}
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", **options)
    stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(stock), logits(model), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("onto", ["original", "quantized"])
def test_a_merge_is_verified(base: Path, tmp_path: Path, onto: str) -> None:
    save_adapter(grown(load(base, "nf4+double")), tmp_path / "adapter")
    make_tokens().save_pretrained(tmp_path / "adapter")
    report = merge_adapter(tmp_path / "adapter", tmp_path / "merged", onto=onto, progress=False)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    found = verify_merged(tmp_path / "adapter", report, str(tmp_path / "rows.jsonl"))
    assert found.effect > found.bound / 10


def test_an_embedding_on_the_cpu(tmp_path: Path) -> None:
    path = make_any(tmp_path / "base", "untied")
    model = grown(load(path, "nf4"))
    expected = logits(model)
    embedding_to_cpu(model)
    assert torch.equal(logits(model), expected)
    save_adapter(model, tmp_path / "adapter")
    restore_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(model), expected)


def test_config_of_a_model_of_several_parts_says_it_everywhere() -> None:
    for config, wanted in (
        ({"vocab_size": 9}, {"vocab_size": 12}),
        ({}, {"vocab_size": 12}),
        ({"text_config": {}}, {"text_config": {"vocab_size": 12}}),
        (
            {"vocab_size": 9, "text_config": {"vocab_size": 9}, "vision_config": {}},
            {"vocab_size": 12, "text_config": {"vocab_size": 12}, "vision_config": {}},
        ),
    ):
        put_vocabulary(12, config)
        assert config == wanted
