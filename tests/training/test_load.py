"""Loading a base: read whole or refused, in its own quantized form or in the one asked for."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from sweeps import swept
from tiny import load, make_checkpoint
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from leanlift import LiftConfig, UserError, get_lift_model, merge_adapter, save_adapter
from leanlift.model import lift_layers
from leanlift.training import RunArguments
from leanlift.training.base import _other_shapes, load_model
from leanlift.weights.quantized import frozen_weight, requantize

CPU = torch.device("cpu")
STORED = ["nf4+double", "nf4", "fp4", "int8"]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("load") / "base", tied=request.param)


def loaded(path: Path | str, **settings: Any) -> Any:
    return load_model(RunArguments(str(path), "", **settings), CPU)


def refused(path: Path | str, match: str, **settings: Any) -> None:
    with pytest.raises(UserError, match=match) as caught:
        loaded(path, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", STORED)
def test_a_stored_form_is_kept_whatever_the_default_is(
    base: Path, tmp_path: Path, kind: str
) -> None:
    stock = load(base, kind)
    stock.save_pretrained(tmp_path)
    for settings in ({}, {"load_in_4bit": False}, {"dtype": "bfloat16"}):
        model = loaded(tmp_path, **settings)
        for name, module in stock.named_modules():
            if name.endswith("_proj"):
                one, two = frozen_weight(module), frozen_weight(model.get_submodule(name))
                assert one.format == two.format
                assert torch.equal(one.rows(0, one.shape[0]), two.rows(0, two.shape[0]))
    refused(tmp_path, "no 16-bit weights to merge onto", merged_dir="x")
    loaded(tmp_path, merged_dir="x", merge_onto="quantized")
    if kind != "int8":
        refused(tmp_path, "quantized to 4 bits on disk", load_in_8bit=True, load_in_4bit=False)


FOREIGN: list[dict[str, Any]] = [
    {"quant_method": "gptq", "bits": 4, "group_size": 128},
    {"quant_method": "awq", "bits": 4, "version": "gemm"},
    {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    {"quant_method": "torchao", "quant_type": "int4_weight_only"},
    {"quant_method": "fp8", "weight_block_size": [128, 128]},
    {"quant_method": "mxfp4"},
    {"quant_method": "hqq"},
    {"quant_method": "from-the-future"},
    {"bits": 4},
    {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False},
]


@pytest.mark.parametrize("found", FOREIGN, ids=lambda f: f"{f.get('quant_method')}-{len(f)}")
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_other_quantized_forms_are_refused_before_a_weight_is_read(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: dict[str, Any], key: str
) -> None:
    path = tmp_path / "quantized"
    shutil.copytree(base, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, key: found}))

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", never)
    refused(path, "is quantized on disk .* name the 16-bit checkpoint")


def without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]

    return change


def with_one(name: str, *shape: int) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = torch.zeros(shape)

    return change


BROKEN = {
    "matrix-missing": (without("model.layers.1.mlp.up_proj.weight"), "lacks: .*up_proj"),
    "norm-missing": (without("model.norm.weight"), "lacks: model.norm"),
    "embedding-missing": (without("model.embed_tokens.weight"), "lacks: .*embed_tokens"),
    "left-over": (with_one("model.layers.2.mlp.up_proj.weight", 192, 64), "has no place for"),
    "adapter-left": (with_one("model.layers.0.self_attn.q_proj.lora_A.weight", 4, 64), "no place"),
    "other-shape": (with_one("model.layers.0.mlp.up_proj.weight", 64, 64), "other shapes"),
    "other-vocabulary": (with_one("model.embed_tokens.weight", 7, 64), "other shapes"),
}


@pytest.mark.parametrize("four", [True, False], ids=["nf4", "dense"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_checkpoint_that_is_not_read_whole_is_refused(
    base: Path, tmp_path: Path, case: str, four: bool
) -> None:
    change, match = BROKEN[case]
    path = tmp_path / "broken"
    shutil.copytree(base, path)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    refused(path, match, load_in_4bit=four)


def test_what_families_leave_out_or_keep_too_much_of_is_no_fault(
    base: Path, tmp_path: Path
) -> None:
    path = tmp_path / "base"
    shutil.copytree(base, path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"].clone())
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert loaded(path).get_output_embeddings().weight.shape[1] == 64


def test_places_that_cannot_be_a_base(base: Path, tmp_path: Path) -> None:
    refused(f"acme/tiny@{'a' * 40}", f"give acme/tiny as the name and {'a' * 40} as --model_rev")
    refused("acme/tiny@", "give acme/tiny as the name and the revision as")
    refused(base, "is a directory, which has no revisions", model_revision="main")
    refused(tmp_path / "none", "does not exist")


def test_the_commit_of_a_cached_name_is_kept_and_asked_for(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub's cache on disk, as it is after a download; nothing is fetched."""
    old, new = "0" * 40, "1" * 40
    cache = tmp_path / "hub"
    repository = cache / "models--acme--tiny"
    for commit, shift in ((old, 0.0), (new, 0.5)):
        snapshot = repository / "snapshots" / commit
        shutil.copytree(base, snapshot)
        tensors = load_file(snapshot / "model.safetensors")
        tensors["model.layers.0.mlp.up_proj.weight"] += shift
        save_file(tensors, snapshot / "model.safetensors", metadata={"format": "pt"})
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(new)
    (repository / "refs" / "v1").write_text(old)
    import huggingface_hub.constants
    import transformers.utils.hub

    for module in (
        huggingface_hub.constants,
        huggingface_hub.file_download,
        transformers.utils.hub,
    ):
        for name in ("HF_HUB_CACHE", "TRANSFORMERS_CACHE"):
            monkeypatch.setattr(module, name, str(cache), raising=False)
    for revision, commit in ((None, new), ("v1", old), (old, old)):
        model = loaded("acme/tiny", model_revision=revision)
        get_lift_model(model, LiftConfig(approx_rank=8), progress=False)
        adapter = tmp_path / f"adapter-{revision}"
        save_adapter(model, adapter)
        data = json.loads((adapter / "adapter_config.json").read_text())
        assert data["base"]["revision"] == commit
        assert data["base"]["name"] == "acme/tiny"
        merge_adapter(adapter, tmp_path / f"merged-{revision}", progress=False)
        merged = load_file(tmp_path / f"merged-{revision}" / "model.safetensors")
        stored = load_file(repository / "snapshots" / commit / "model.safetensors")
        name = "model.layers.0.mlp.up_proj.weight"
        assert torch.equal(merged[name], stored[name].half())


def test_models_with_layers_of_peft_are_refused(base: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    for model in (
        get_peft_model(load(base, "dense"), config),
        inject_adapter_in_model(config, load(base, "dense")),
        get_peft_model(load(base, "nf4"), config),
    ):
        with pytest.raises(UserError, match=r"holds layers of PEFT .* merge its adapter"):
            get_lift_model(model, LiftConfig(approx_rank=8), progress=False)
        assert not lift_layers(model)


@pytest.mark.parametrize("kind", [AutoModelForSequenceClassification, AutoModel])
@pytest.mark.filterwarnings("ignore")
def test_models_without_a_language_models_head_are_refused(base: Path, kind: Any) -> None:
    model = kind.from_pretrained(base)
    with pytest.raises(UserError, match="no output head over its vocabulary"):
        get_lift_model(model, LiftConfig(approx_rank=8), progress=False)
    assert not lift_layers(model)


@pytest.mark.parametrize(
    "kind", swept(["dense", "nf4+double", "nf4", "int8"], "dense", "nf4+double")
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_weights_that_are_no_numbers_are_found_wherever_they_are(
    base: Path, tmp_path: Path, kind: str, value: float
) -> None:
    fine = get_lift_model(load(base, kind), LiftConfig(approx_rank=8), progress=False)
    save_adapter(fine, tmp_path / "adapter")
    tensors = load_file(base / "model.safetensors")
    for name in (
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.0.self_attn.v_proj.weight",
        *(["lm_head.weight"] if "lm_head.weight" in tensors else []),
    ):
        path = tmp_path / f"broken-{name}"
        shutil.copytree(base, path)
        broken = {key: tensor.clone() for key, tensor in tensors.items()}
        broken[name].view(-1)[5] = value
        save_file(broken, path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"has \d+ NaN or infinite weights") as caught:
            get_lift_model(load(path, kind), LiftConfig(approx_rank=8), progress=False)
        assert name in str(caught.value)
        with pytest.raises(UserError, match=r"NaN or infinite numbers|has other weights"):
            merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=path, progress=False)
        assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("kind", ["dense", "nf4", "int8"])
def test_a_model_that_is_no_longer_its_checkpoint_is_refused(base: Path, kind: str) -> None:
    """Another adapter merged into it in memory, say: what is trained then has no base on disk."""
    model = load(base, kind)
    other = load(base, "dense")
    name = "model.layers.1.mlp.down_proj"
    with torch.no_grad():
        other.get_submodule(name).weight.add_(0.05 * torch.randn(64, 192))
    if kind == "dense":
        model.set_submodule(name, other.get_submodule(name))
    else:
        fmt = frozen_weight(model.get_submodule(name)).format
        weight: Any = requantize(other.get_submodule(name).weight.data, fmt, CPU)
        model.get_submodule(name).weight = weight.module.weight
    with pytest.raises(UserError, match=f"has other weights than .*, in {re.escape(name)}: .*Save"):
        get_lift_model(model, LiftConfig(approx_rank=8), progress=False)
    assert not lift_layers(model)


def test_numbers_that_float16_has_no_room_for_are_called_that(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "large"
    shutil.copytree(base, path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"][3] = 7e4
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="too large for float16, so load the base in bfloat16"):
        get_lift_model(load(path, "nf4", torch.float16), LiftConfig(approx_rank=8), progress=False)
    model = get_lift_model(load(path, "nf4"), LiftConfig(approx_rank=8), progress=False)
    save_adapter(model, tmp_path / "adapter")
    for onto in ("original", "quantized"):
        with pytest.raises(
            UserError, match=r"model\.norm\.weight holds 70000, more than float16 can"
        ):
            merge_adapter(tmp_path / "adapter", tmp_path / "merged", onto=onto, progress=False)


def test_an_embedding_of_another_size_is_seen_whatever_transformers_says(base: Path) -> None:
    """Older versions take one into a quantized model and report nothing."""
    model = loaded(base, load_in_4bit=False)
    assert _other_shapes(model, {}) == set()
    embedding = model.get_input_embeddings()
    embedding.num_embeddings += 7
    ((name, stored, expected),) = _other_shapes(model, {"mismatched_keys": set()})
    assert name == "model.embed_tokens.weight"
    assert (stored[0] + 7, stored[1]) == tuple(expected)
