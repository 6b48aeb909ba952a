"""The merged checkpoint is what was trained, and an ordinary checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sweeps import swept
from tiny import make_checkpoint, make_tokenizer
from trained import KINDS, logits, trained
from transformers import AutoModelForCausalLM, AutoTokenizer

from leanlift import UserError, merge_adapter, save_adapter
from leanlift.evaluation.verify import verify_merged
from leanlift.measure import LiveBytes
from leanlift.model import lift_layers


def checkpoint(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", swept([True, False], True), ids=["tied", "untied"])
def test_onto_quantized_is_the_trained_model(tmp_path: Path, kind: str, tied: bool) -> None:
    base = make_checkpoint(tmp_path / "base", tied=tied, biased=True, hidden=80, intermediate=200)
    model = trained(base, tmp_path / "adapter", kind)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", onto="quantized", progress=False)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    expected = logits(model)
    rounded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rounded.load_state_dict(
        {
            name: effective(model, name, tensor).half().float()
            for name, tensor in rounded.state_dict().items()
        }
    )
    # The only difference is the rounding of the weights to fp16, so the logits are those of a
    # dense model with the effective weights rounded to fp16, and close to the trained model's.
    assert torch.equal(logits(stock), logits(rounded.eval()))
    assert (logits(stock) - expected).abs().max() <= 2e-3 * expected.abs().max()


def effective(model: Any, name: str, original: torch.Tensor) -> torch.Tensor:
    layer = lift_layers(model).get(name.removesuffix(".weight"))
    return layer.effective.rows(0, layer.out_features) if layer is not None else original


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", swept([True, False], False), ids=["tied", "untied"])
def test_onto_original_is_the_base_with_the_offsets(tmp_path: Path, kind: str, tied: bool) -> None:
    base = make_checkpoint(tmp_path / "base", tied=tied, biased=True, hidden=80, intermediate=200)
    layers = lift_layers(trained(base, tmp_path / "adapter", kind))
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype="float32", progress=False)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = logits(expected)
    for name, layer in layers.items():
        weight = expected.get_submodule(name).weight.data
        for store in (layer.index, layer.values), (layer.retired_index, layer.retired_values):
            weight.view(-1)[store[0].to_flat()] += store[1].detach()
    assert torch.equal(logits(stock), logits(expected))
    assert (logits(stock) - before).abs().max() > 0.1 * before.abs().max()


@pytest.mark.parametrize("kind", ["nf4+double", "int8"])
def test_onto_original_is_exactly_original_plus_offsets(tmp_path: Path, kind: str) -> None:
    base = make_checkpoint(tmp_path / "base", dtype=torch.float16)
    model = trained(base, tmp_path / "adapter", kind)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", onto="original", progress=False)
    before, after = checkpoint(base), checkpoint(tmp_path / "merged")
    assert list(before) == list(after)
    layers = lift_layers(model)
    touched = 0
    for name, tensor in before.items():
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None:
            assert tensor.view(torch.uint8).equal(after[name].view(torch.uint8)), name
            continue
        dense = tensor.float()
        layer.add_offsets_(dense, 0, layer.out_features)
        assert torch.equal(dense.half(), after[name]), name
        assert not torch.equal(tensor, after[name])
        touched += 1
    assert touched == len(layers) == 14


def test_the_output_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", tied=True, max_shard_size="30KB")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(base)
    trained(base, tmp_path / "adapter")
    report = merge_adapter(
        tmp_path / "adapter",
        tmp_path / "merged",
        dtype="bfloat16",
        max_shard_size="40KB",
        progress=False,
    )
    out = tmp_path / "merged"
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == report.nbytes
    assert len(files) > 2
    tensors = checkpoint(out)
    assert "lm_head.weight" not in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    stock = AutoModelForCausalLM.from_pretrained(out)
    assert stock.lm_head.weight is stock.model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    assert '[{"role": "user"' in (out / "README.md").read_text()  # the base's template counts
    assert (out / "generation_config.json").is_file()


def test_quantized_linears_that_were_not_trained_are_merged_as_they_were(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    model = trained(base, tmp_path / "adapter", target_modules=("q_proj", "down_proj"))
    assert len(lift_layers(model)) == 4
    merge_adapter(
        tmp_path / "adapter", tmp_path / "merged", dtype="float32", onto="quantized", progress=False
    )
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.equal(logits(stock), logits(model))


def test_the_merge_holds_one_tensor_not_the_model(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", tied=False, hidden=256, intermediate=1024)
    trained(base, tmp_path / "adapter", density=0.02)
    largest = 4 * 1024 * 256
    whole = sum(tensor.nbytes for tensor in checkpoint(base).values())
    with LiveBytes() as live:
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", progress=False)
    assert live.peak < 4 * largest < 0.6 * whole


def refused(tmp_path: Path, match: str, **kwargs: Any) -> None:
    with pytest.raises(UserError, match=match):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", progress=False, **kwargs)
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob(".merged*")), "something half-written was left behind"


def test_another_base_is_refused(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    trained(base, tmp_path / "adapter")
    other = make_checkpoint(tmp_path / "shape", hidden=128)
    refused(tmp_path, "was trained on", base=other)
    twin = make_checkpoint(tmp_path / "twin")
    tensors = checkpoint(twin)
    tensors["model.norm.weight"] += 0.01
    save_file(tensors, twin / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, "has other weights", base=twin)
    refused(tmp_path, "does not exist: name the base checkpoint", base=tmp_path / "nowhere")


def test_broken_checkpoints_and_bad_requests_are_refused(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", tied=False, max_shard_size="60KB")
    trained(base, tmp_path / "adapter")
    refused(tmp_path, "expected onto", onto="sideways")
    refused(tmp_path, "expected a dtype", dtype="int8")
    refused(tmp_path, "expected a shard size", max_shard_size="big")
    shard = sorted(base.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    refused(tmp_path, "not a whole safetensors file")
    shard.unlink()
    refused(tmp_path, f"{shard.name} does not exist")
    shard.write_bytes(whole)
    config = base / "config.json"
    data = json.loads(config.read_text())
    config.write_text(json.dumps({**data, "quantization_config": {"load_in_4bit": True}}))
    refused(tmp_path, "itself a quantized checkpoint")
    config.write_text(json.dumps(data))
    for file in base.glob("*.safetensors*"):
        file.unlink()
    (base / "pytorch_model.bin").write_bytes(b"x")
    refused(tmp_path, "only pickled weights")


def test_an_output_that_exists_is_left_alone(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    trained(base, tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "precious").write_text("keep")
    with pytest.raises(UserError, match="already exists and is not empty"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", progress=False)
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["precious"]


def test_a_value_that_overflows_fp16_is_named(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    model = trained(base, tmp_path / "adapter")
    layer = lift_layers(model)["model.layers.1.mlp.up_proj"]
    layer.values.data[3] = 1e5
    save_adapter(model, tmp_path / "adapter")
    refused(tmp_path, r"model\.layers\.1\.mlp\.up_proj\.weight holds .*bfloat16")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype="bfloat16", progress=False)


def test_a_disk_that_is_too_small_is_found_before_the_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    base = make_checkpoint(tmp_path / "base")
    trained(base, tmp_path / "adapter")
    usage = type(shutil.disk_usage(tmp_path))(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr("leanlift.export.directory.shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"needs 0.\d MiB, but only 0.0 MiB are free at"):
        merge_adapter(tmp_path / "adapter", tmp_path / "deep" / "merged")
    assert not (tmp_path / "deep").exists()


def test_the_card_says_what_it_is(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    trained(base, tmp_path / "adapter")
    run = {"dataset_name": "/home/me/rows.json", "learning_rate": 2e-4, "seed": 7}
    memory = {"categories": {"values": 2**20, "index": 2**19, "<script>": "many"}}
    (tmp_path / "adapter" / "run.json").write_text(json.dumps(run))
    (tmp_path / "adapter" / "memory.json").write_text(json.dumps(memory))
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", onto="quantized", progress=False)
    card = (tmp_path / "merged" / "README.md").read_text()
    for said in (
        "library_name: transformers",
        "quantized: exactly the model that was trained",
        "| data | rows.json |",
        "`learning_rate: 0.0002`, `seed: 7`",
        "| values | 1.0 |",
        "| **peak** | 1.5 |",
        'pipeline("text-generation", model="merged")',
        "nf4+double, computed in float32",
    ):
        assert said in card, said
    assert "script" not in card
    assert "/home/me" not in card
    assert not card.startswith("---\nbase_model")  # a directory means nothing to a reader


ROWS = [{"prompt": f"say {i}: ", "completion": str(i)} for i in range(6)]


@pytest.mark.parametrize("onto", ["original", "quantized"])
@pytest.mark.parametrize("kind", swept(["nf4+double", "int8", "dense"], "nf4+double"))
@pytest.mark.parametrize("dtype", swept(["float32", "float16", "bfloat16"], "float16"))
def test_verify_passes_what_is_right_and_nothing_else(
    tmp_path: Path, onto: str, kind: str, dtype: str
) -> None:
    base = make_checkpoint(tmp_path / "base", biased=True, tied=False)
    trained(base, tmp_path / "adapter", kind)
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(ROWS))
    report = merge_adapter(
        tmp_path / "adapter", tmp_path / "merged", dtype=dtype, onto=onto, progress=False
    )
    with pytest.raises(UserError, match="does not say which data"):
        verify_merged(tmp_path / "adapter", report)
    found = verify_merged(tmp_path / "adapter", report, str(rows))
    assert found.prompts == 4
    assert 0 <= found.difference <= found.bound < 0.2 * found.effect
    weights = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.down_proj.weight"].neg_()
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"is not what .* and its base compute: logits"):
        verify_merged(tmp_path / "adapter", report, str(rows))
    tensors["model.layers.1.mlp.down_proj.weight"].fill_(float("nan"))
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="logits differ by nan"):
        verify_merged(tmp_path / "adapter", report, str(rows))


def test_links_and_indexes_that_lead_elsewhere_are_refused(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", tied=False, max_shard_size="60KB")
    trained(base, tmp_path / "adapter")
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    link = tmp_path / "adapter" / "tokenizer.json"
    link.symlink_to(secret)
    refused(tmp_path, "is a link to .*secret.json, outside of its directory")
    link.unlink()
    index = base / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    for weight_map in ({"model.norm.weight": "../x.safetensors"}, {"a": 3}, ["a"], None):
        index.write_text(json.dumps({**data, "weight_map": weight_map}))
        refused(tmp_path, "holds no map from tensors to files beside it")


def test_what_overflows_bfloat16_is_refused_too(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    tensors = checkpoint(base)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 3.4e38
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    trained(base, tmp_path / "adapter", "dense", target_modules=("q_proj",))
    refused(tmp_path, r"up_proj\.weight holds 3\.4e\+38.*use dtype=float32", dtype="bfloat16")
