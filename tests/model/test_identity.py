"""The base that was meant is taken in every form, and no other one is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sweeps import swept
from tiny import load, make_checkpoint
from trained import KINDS
from transformers import AutoModelForCausalLM

from leanlift import (
    LiftConfig,
    UserError,
    combine_adapters,
    get_lift_model,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from leanlift.model import lift_layers, lift_state

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STEP = 2e-3
"""What ten steps of Adam at 2e-4 move an entry by; weights have a standard deviation of 0.02."""


def ids(value: Any) -> str:
    return str(value).removeprefix("torch.")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("identity") / "base", tied=False)


def stored_as(base: Path, dtype: torch.dtype, path: Path) -> Path:
    shutil.copytree(base, path)
    tensors = load_file(base / "model.safetensors")
    cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(cast, path / "model.safetensors", metadata={"format": "pt"})
    return path


def edited(base: Path, path: Path, change: Any) -> Path:
    """A copy of a checkpoint whose tensors `change` has edited in place."""
    shutil.copytree(base, path)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def train(base: Path, adapter: Path, kind: str, dtype: torch.dtype, **config: Any) -> Any:
    """An adapter with offsets as small as a short training makes them."""
    settings = LiftConfig(approx_rank=8, **config)
    model = get_lift_model(load(base, kind, dtype), settings, progress=False)
    for layer in lift_layers(model).values():
        layer.values.data.copy_(STEP * torch.randn(layer.values.shape).sign())
    save_adapter(model, adapter)
    return model


def merge(adapter: Path, output: Path, base: Path, **options: Any) -> Path:
    merge_adapter(adapter, output, base=base, progress=False, **options)
    return output


@pytest.mark.parametrize("dtype", swept(DTYPES, torch.bfloat16), ids=ids)
@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_known_in_every_form_and_its_merges_are_not(
    base: Path, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    adapter = tmp_path / "adapter"
    train(base, adapter, kind, dtype)
    for stored in DTYPES:
        copy_of_it = stored_as(base, stored, tmp_path / f"base-{ids(stored)}")
        merge(adapter, tmp_path / f"onto-{ids(stored)}", copy_of_it, dtype="float32")
    load_adapter(load(base, kind, dtype), adapter)
    for out in ("float32", "bfloat16", "float16"):
        merged = merge(adapter, tmp_path / out, base, dtype=out)
        with pytest.raises(UserError, match=r"has other weights in .*model\.layers"):
            merge(adapter, tmp_path / "twice", merged)
        assert not (tmp_path / "twice").exists()
    with pytest.raises(UserError, match="the same shapes but other weights"):
        load_adapter(load(tmp_path / "float32", kind, dtype), adapter)
    if kind != "dense":
        exact = merge(adapter, tmp_path / "exact", base, onto="quantized", dtype="float32")
        with pytest.raises(UserError, match="has other weights"):
            merge(adapter, tmp_path / "twice", exact)


def low_rank(tensors: dict[str, torch.Tensor], name: str, scale: float) -> None:
    m, n = tensors[name].shape
    torch.manual_seed(3)
    tensors[name] += scale * torch.randn(m, 4) @ torch.randn(4, n) / 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_twin_that_differs_in_its_matrices_is_refused(
    base: Path, tmp_path: Path, kind: str
) -> None:
    adapter = tmp_path / "adapter"
    train(base, adapter, kind, torch.float32)
    name = "model.layers.1.mlp.down_proj.weight"
    matrices = [f"{module}.weight" for module in lift_layers_of(adapter)]

    def lora(tensors: dict[str, torch.Tensor]) -> None:
        for matrix in matrices:
            low_rank(tensors, matrix, STEP)

    def one(tensors: dict[str, torch.Tensor]) -> None:
        low_rank(tensors, name, 0.01)

    def scaled(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] *= 1.2

    def exchanged(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name.replace("layers.1", "layers.0")].clone()

    for change in (lora, one, scaled, exchanged):
        twin = edited(base, tmp_path / change.__name__, change)
        with pytest.raises(UserError, match="has other weights in model"):
            merge(adapter, tmp_path / "merged", twin)
        with pytest.raises(UserError, match="the same shapes but other weights"):
            load_adapter(load(twin, kind), adapter)


def lift_layers_of(adapter: Path) -> list[str]:
    return list(json.loads((adapter / "adapter_config.json").read_text())["base"]["shapes"])


def test_samples_stay_those_of_the_first_mask(base: Path, tmp_path: Path) -> None:
    model = train(base, tmp_path / "one", "nf4", torch.float32)
    samples = dict(lift_state(model).base.samples)
    again = load_adapter(load(base, "nf4"), tmp_path / "one")
    assert dict(lift_state(again).base.samples) == samples
    train(base, tmp_path / "few", "nf4", torch.float32, target_modules=("q_proj",))
    load_adapter(model, tmp_path / "few")
    load_adapter(model, tmp_path / "one")
    assert dict(lift_state(model).base.samples) == samples
    save_adapter(model, tmp_path / "two")
    name = "adapter_config.json"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_adapter_without_samples_loads_and_says_what_it_cannot_tell(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = tmp_path / "adapter"
    train(base, adapter, "nf4", torch.float32)
    file = adapter / "adapter_config.json"
    data = json.loads(file.read_text())
    data["format_version"] = 1
    del data["base"]["samples"], data["base"]["revision"]
    file.write_text(json.dumps(data))
    for use in (
        lambda: load_adapter(load(base, "nf4"), adapter),
        lambda: merge(adapter, tmp_path / "merged", base),
    ):
        caplog.clear()
        use()
        assert "cannot be told apart" in caplog.text
    twin = edited(base, tmp_path / "twin", lambda t: t["model.norm.weight"].add_(0.01))
    with pytest.raises(UserError, match="has other weights"):
        merge(adapter, tmp_path / "other", twin)


def test_adapters_of_twins_are_not_combined(base: Path, tmp_path: Path) -> None:
    train(base, tmp_path / "one", "nf4", torch.float32)
    train(base, tmp_path / "two", "nf4", torch.float32, selector="random")
    combine_adapters([tmp_path / "one", tmp_path / "two"], tmp_path / "both", progress=False)
    load_adapter(load(base, "nf4"), tmp_path / "both")
    twin = edited(
        base, tmp_path / "twin", lambda t: low_rank(t, "model.layers.0.mlp.up_proj.weight", 0.05)
    )
    train(twin, tmp_path / "three", "nf4", torch.float32)
    with pytest.raises(UserError, match="only adapters of one base"):
        combine_adapters([tmp_path / "one", tmp_path / "three"], tmp_path / "x", progress=False)


@pytest.mark.parametrize("kind", ["nf4+double", "nf4", "fp4", "int8"])
def test_a_quantized_checkpoint_is_a_base_like_others(
    base: Path, tmp_path: Path, kind: str
) -> None:
    """Attach, save, reload; merge onto what it holds, and onto the 16-bit original."""
    load(base, kind).save_pretrained(tmp_path / "stored")
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "stored")
    model = get_lift_model(stored, LiftConfig(approx_rank=8), progress=False)
    torch.manual_seed(1)
    for layer in lift_layers(model).values():
        layer.values.data.normal_(std=0.05)
    adapter = tmp_path / "adapter"
    save_adapter(model, adapter)
    with torch.no_grad():
        ids = torch.arange(3, 43).reshape(2, 20)
        trained = model.eval()(ids).logits
        again = load_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "stored"), adapter)
        assert torch.equal(again.eval()(ids).logits, trained)
        load_adapter(load(base, kind), adapter)
        with pytest.raises(UserError, match=r"itself a quantized checkpoint.*--onto quantized"):
            merge(adapter, tmp_path / "no", tmp_path / "stored")
        outputs = []
        for source in (tmp_path / "stored", base):
            out = merge(adapter, tmp_path / f"merged-{source.name}", source, onto="quantized",
                        dtype="float32")  # fmt: skip
            assert "quantization_config" not in json.loads((out / "config.json").read_text())
            merged, found = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
            assert not any(found.values())
            torch.testing.assert_close(merged(ids).logits, trained, rtol=1e-4, atol=1e-5)
            outputs.append(load_file(out / "model.safetensors"))
        assert outputs[0].keys() == outputs[1].keys()
        assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in outputs[0])
    merge(adapter, tmp_path / "original", base)

    def zero_a_scale(tensors: dict[str, torch.Tensor]) -> None:
        scale = next(k for k in tensors if "down_proj" in k and k.endswith(("absmax", "SCB")))
        tensors[scale].zero_()

    other = edited(tmp_path / "stored", tmp_path / "other", zero_a_scale)
    with pytest.raises(UserError, match=r"has other weights in .*down_proj"):
        merge(adapter, tmp_path / "no", other, onto="quantized")

    def lose_a_part(tensors: dict[str, torch.Tensor]) -> None:
        scale = next(k for k in tensors if "down_proj" in k and k.endswith(("absmax", "SCB")))
        del tensors[scale]

    other = edited(tmp_path / "stored", tmp_path / "lost", lose_a_part)
    with pytest.raises(UserError, match=r"not whole|nothing to read"):
        merge(adapter, tmp_path / "no", other, onto="quantized")
